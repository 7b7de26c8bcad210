-- SPDX-License-Identifier: Apache-2.0
-- What each atespace uses, for its quota; kept up by the transactions that change it.
CREATE TABLE usage (
    atespace TEXT PRIMARY KEY,
    actors INTEGER NOT NULL,
    bytes INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

INSERT INTO usage (atespace, actors, bytes)
SELECT atespace, count(*), coalesce(sum((
    SELECT sum(CASE WHEN json_extract(snapshot.value, '$.manifest') IS NULL
                    THEN json_extract(snapshot.value, '$.bytes')
                    ELSE json_extract(snapshot.value, '$.stored_bytes') END)
    FROM json_each(objects.doc, '$.snapshots') AS snapshot)), 0)
FROM objects WHERE kind = 3 GROUP BY atespace;
