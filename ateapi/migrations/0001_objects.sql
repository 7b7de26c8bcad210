-- SPDX-License-Identifier: Apache-2.0
-- One row per record. The columns beside `doc` are what is looked up by; `doc` is the record.
CREATE TABLE objects (
    kind INTEGER NOT NULL,
    key TEXT NOT NULL,
    atespace TEXT NOT NULL,
    name TEXT NOT NULL,
    state INTEGER NOT NULL,
    template TEXT NOT NULL,
    busy INTEGER NOT NULL,
    revision INTEGER NOT NULL,
    doc TEXT NOT NULL,
    PRIMARY KEY (kind, key)
) STRICT;
CREATE UNIQUE INDEX objects_name ON objects (kind, atespace, name);
CREATE INDEX objects_state ON objects (kind, state, atespace, name);
CREATE INDEX objects_template ON objects (kind, template, atespace, name) WHERE template <> '';
CREATE INDEX objects_busy ON objects (kind, atespace, name) WHERE busy = 1;

-- Every committed change with its revision, for watches; trimmed from the old end.
CREATE TABLE changelog (
    revision INTEGER PRIMARY KEY,
    kind INTEGER NOT NULL,
    key TEXT NOT NULL,
    atespace TEXT NOT NULL,
    name TEXT NOT NULL,
    deleted INTEGER NOT NULL,
    doc TEXT NOT NULL
) STRICT;

CREATE TABLE events (
    revision INTEGER PRIMARY KEY,
    atespace TEXT NOT NULL,
    subject TEXT NOT NULL,
    reason TEXT NOT NULL,
    doc TEXT NOT NULL
) STRICT;
CREATE INDEX events_subject ON events (atespace, subject, revision);

-- Request ids and what they led to.
CREATE TABLE requests (
    id TEXT PRIMARY KEY,
    fingerprint TEXT NOT NULL,
    outcome TEXT NOT NULL,
    time_ms INTEGER NOT NULL
) STRICT;
CREATE INDEX requests_time ON requests (time_ms);

-- Sealed secrets by owner; never in the changelog.
CREATE TABLE sealed (
    key TEXT PRIMARY KEY,
    value BLOB NOT NULL
) STRICT;

-- Which committed manifest names which blob.
CREATE TABLE refs (
    holder TEXT NOT NULL,
    blob TEXT NOT NULL,
    PRIMARY KEY (holder, blob)
) STRICT, WITHOUT ROWID;
CREATE INDEX refs_blob ON refs (blob);

-- What nothing names any more and a node has still to delete.
CREATE TABLE garbage (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    holder TEXT NOT NULL,
    item TEXT NOT NULL
) STRICT;

CREATE TABLE meta (
    key TEXT PRIMARY KEY,
    value INTEGER NOT NULL
) STRICT;
-- The last revision given out, and the oldest that a watch can resume from.
INSERT INTO meta (key, value) VALUES ('revision', 0), ('floor', 0);
