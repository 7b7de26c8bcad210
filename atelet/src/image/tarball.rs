// SPDX-License-Identifier: Apache-2.0
//! Reading a tar stream that may be hostile.
//!
//! Headers are decoded by the `tar` crate; the framing around them is ours, because its iterator reads extension
//! members of any declared size into memory (a few kilobytes of gzip become gigabytes), splits PAX records at
//! newlines, which breaks binary values such as `security.capability`, and takes PAX sparse files for plain ones.
//!
//! Understood: ustar, GNU (long names, base-256 numbers, sparse `S`), PAX (`path`, `linkpath`, `size`, `uid`, `gid`,
//! `mtime`, `SCHILY.xattr.*`, sparse 0.0, 0.1 and 1.0). Links, directories and devices have no data whatever their
//! size field says, as in Go's reader, by which every builder checks its layers. A member that two readers could
//! understand differently (two long names, overlapping sparse pieces) is an error.
use std::io::{self, Read};

use tar::{EntryType, GnuExtSparseHeader, Header};

const BLOCK: usize = 512;
/// Longest GNU long name or link, bytes; Linux takes 4096.
const MAX_LONG_NAME: u64 = 8 << 10;
/// Largest PAX header, bytes: room for the largest attributes that Linux takes (64 KiB each).
const MAX_PAX: u64 = 1 << 20;
/// Most pieces of a sparse file.
const MAX_PIECES: usize = 100_000;

/// Offset and length of each piece of a sparse file that has data, and the file's apparent size.
type Pieces = (Vec<(u64, u64)>, u64);

/// What a member is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    File,
    Directory,
    Symlink,
    Hardlink,
    Fifo,
    Device,
    /// A type flag that we do not know.
    Other(u8),
}

/// One member of an archive, without its data.
#[derive(Debug)]
pub(super) struct Member {
    pub path: Vec<u8>,
    /// Target of a link.
    pub link: Vec<u8>,
    pub kind: Kind,
    /// Permission bits including setuid, setgid and sticky.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Seconds and nanoseconds.
    pub mtime: (i64, u32),
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Apparent size of a file, bytes.
    pub size: u64,
    /// Of a sparse file: offset and length of each piece that has data, ascending.
    pub pieces: Option<Vec<(u64, u64)>>,
}

/// Why a stream cannot be read on.
#[derive(Debug)]
pub(super) enum TarError {
    /// The archive is malformed; near this member if one is known.
    Format { near: String, reason: String },
    /// The reader below failed.
    Io(io::Error),
}

impl From<io::Error> for TarError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// Records of PAX headers that apply to the next member.
#[derive(Debug, Default)]
struct Pax {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    mtime: Option<(i64, u32)>,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    sparse_major: Option<u64>,
    sparse_minor: Option<u64>,
    sparse_name: Option<Vec<u8>>,
    sparse_size: Option<u64>,
    sparse_numbers: Vec<u64>,
}

/// A tar stream, read member by member; see the module.
pub(super) struct Tarball<R> {
    reader: R,
    /// Bytes of the current member not read yet, and what fills up its last block.
    remaining: u64,
    padding: u64,
    last: String,
}

impl<R: Read> Tarball<R> {
    pub fn new(reader: R) -> Self {
        Self { reader, remaining: 0, padding: 0, last: String::new() }
    }

    /// The reader, positioned after what was read.
    pub fn into_inner(self) -> R {
        self.reader
    }

    /// The next member, or none at the end of the archive. Data not read of the one before is passed over.
    pub fn next_member(&mut self) -> Result<Option<Member>, TarError> {
        let mut long_name = None;
        let mut long_link = None;
        let mut pax = None;
        loop {
            self.skip_rest()?;
            let Some(header) = self.header()? else {
                if long_name.is_some() || long_link.is_some() || pax.is_some() {
                    return Err(self.format("it ends after a header that describes the next member"));
                }
                return Ok(None);
            };
            let size = header.entry_size().map_err(|error| self.format(&error.to_string()))?;
            match header.entry_type() {
                EntryType::GNULongName => {
                    let name = self.extension(size, MAX_LONG_NAME, "long name")?;
                    if long_name.replace(trim_nul(name)).is_some() {
                        return Err(self.format("a member has two long names"));
                    }
                }
                EntryType::GNULongLink => {
                    let name = self.extension(size, MAX_LONG_NAME, "long link")?;
                    if long_link.replace(trim_nul(name)).is_some() {
                        return Err(self.format("a member has two long links"));
                    }
                }
                EntryType::XHeader => {
                    let records = self.extension(size, MAX_PAX, "PAX header")?;
                    let parsed = parse_pax(&records).map_err(|reason| self.format(&reason))?;
                    if pax.replace(parsed).is_some() {
                        return Err(self.format("a member has two PAX headers"));
                    }
                }
                EntryType::XGlobalHeader => {
                    self.extension(size, MAX_PAX, "global PAX header")?;
                }
                _ => {
                    let mut pax = pax.unwrap_or_default();
                    if (long_name.is_some() && pax.path.is_some())
                        || (long_link.is_some() && pax.link.is_some())
                    {
                        return Err(self.format("a member has both a GNU and a PAX long name"));
                    }
                    pax.path = pax.path.or(long_name);
                    pax.link = pax.link.or(long_link);
                    return self.member(&header, size, pax).map(Some);
                }
            }
        }
    }

    /// Reads data of the current member; 0 at its end.
    pub fn read_data(&mut self, buffer: &mut [u8]) -> Result<usize, TarError> {
        let most = usize::try_from(self.remaining).unwrap_or(usize::MAX).min(buffer.len());
        if most == 0 {
            return Ok(0);
        }
        let read = self.reader.read(&mut buffer[..most])?;
        if read == 0 {
            return Err(self.format("it ends in the middle of a member"));
        }
        self.remaining -= read as u64;
        Ok(read)
    }

    fn format(&self, reason: &str) -> TarError {
        TarError::Format { near: self.last.clone(), reason: reason.to_owned() }
    }

    fn skip_rest(&mut self) -> Result<(), TarError> {
        let rest = self.remaining + self.padding;
        let skipped = io::copy(&mut (&mut self.reader).take(rest), &mut io::sink())?;
        if skipped < self.remaining {
            return Err(self.format("it ends in the middle of a member"));
        }
        (self.remaining, self.padding) = (0, 0);
        Ok(())
    }

    fn header(&mut self) -> Result<Option<Header>, TarError> {
        let mut header = Header::new_old();
        let read = read_up_to(&mut self.reader, header.as_mut_bytes())?;
        if read == 0 {
            return Ok(None);
        }
        if read < BLOCK {
            return Err(self.format("it ends in the middle of a header"));
        }
        if header.as_bytes().iter().all(|&byte| byte == 0) {
            return Ok(None);
        }
        let bytes = header.as_bytes();
        let sum: u32 =
            bytes[..148].iter().chain(&bytes[156..]).map(|&byte| u32::from(byte)).sum::<u32>() + 8 * 32;
        if header.cksum().ok() != Some(sum) {
            return Err(self.format("the checksum of a header is wrong"));
        }
        Ok(Some(header))
    }

    fn extension(&mut self, size: u64, limit: u64, what: &str) -> Result<Vec<u8>, TarError> {
        if size > limit {
            return Err(self.format(&format!("a {what} has {size} bytes, at most {limit} are taken")));
        }
        self.begin(size);
        let mut bytes = vec![0; size as usize];
        if read_up_to(&mut self.reader, &mut bytes)? < bytes.len() {
            return Err(self.format("it ends in the middle of an extension header"));
        }
        self.remaining = 0;
        Ok(bytes)
    }

    fn begin(&mut self, size: u64) {
        self.remaining = size;
        self.padding = size.wrapping_neg() % BLOCK as u64;
    }

    fn member(&mut self, header: &Header, size: u64, pax: Pax) -> Result<Member, TarError> {
        let path = pax.sparse_name.clone().or(pax.path.clone()).unwrap_or_else(|| header.path_bytes().into());
        self.last = String::from_utf8_lossy(&path).chars().take(200).collect();
        let flag = header.entry_type().as_byte();
        let mut kind = match header.entry_type() {
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => Kind::File,
            EntryType::Directory => Kind::Directory,
            EntryType::Symlink => Kind::Symlink,
            EntryType::Link => Kind::Hardlink,
            EntryType::Fifo => Kind::Fifo,
            EntryType::Char | EntryType::Block => Kind::Device,
            _ => Kind::Other(flag),
        };
        // Archives from before directories had a type.
        if kind == Kind::File && path.ends_with(b"/") {
            kind = Kind::Directory;
        }
        let size = match kind {
            Kind::File | Kind::Other(_) => pax.size.unwrap_or(size),
            _ => 0,
        };
        let link = pax
            .link
            .clone()
            .or_else(|| header.link_name_bytes().map(std::borrow::Cow::into_owned))
            .unwrap_or_default();
        let owner = |from_pax: Option<u64>, own: io::Result<u64>, what: &str| {
            let id = from_pax.map_or(own, Ok).map_err(|error| self.format(&format!("{what}: {error}")))?;
            u32::try_from(id)
                .ok()
                .filter(|&id| id != u32::MAX)
                .ok_or_else(|| self.format(&format!("{what} {id} is not a valid id")))
        };
        let uid = owner(pax.uid, header.uid(), "uid")?;
        let gid = owner(pax.gid, header.gid(), "gid")?;
        let mode = header.mode().map_err(|error| self.format(&error.to_string()))? & 0o7777;
        let mtime = match pax.mtime {
            Some(mtime) => mtime,
            None => (header.mtime().ok().and_then(|mtime| i64::try_from(mtime).ok()).unwrap_or(0), 0),
        };
        self.begin(size);
        let mut member =
            Member { path, link, kind, mode, uid, gid, mtime, xattrs: Vec::new(), size, pieces: None };
        if kind == Kind::File {
            if header.entry_type() == EntryType::GNUSparse {
                let (pieces, real) = self.gnu_pieces(header)?;
                (member.pieces, member.size) = (Some(pieces), real);
            } else if let Some((pieces, real)) = self.pax_pieces(&pax)? {
                (member.pieces, member.size) = (Some(pieces), real);
            }
            if let Some(pieces) = &member.pieces {
                self.check_pieces(pieces, member.size)?;
            }
        }
        member.xattrs = pax.xattrs;
        Ok(member)
    }

    fn gnu_pieces(&mut self, header: &Header) -> Result<Pieces, TarError> {
        let Some(gnu) = header.as_gnu() else {
            return Err(self.format("a sparse member without a GNU header"));
        };
        let number =
            |this: &Self, value: io::Result<u64>| value.map_err(|error| this.format(&error.to_string()));
        let real = number(self, gnu.real_size())?;
        let mut pieces = Vec::new();
        for piece in gnu.sparse.iter().filter(|piece| !piece.is_empty()) {
            pieces.push((number(self, piece.offset())?, number(self, piece.length())?));
        }
        let mut extended = gnu.is_extended();
        while extended {
            let mut more = GnuExtSparseHeader::new();
            if read_up_to(&mut self.reader, more.as_mut_bytes())? < BLOCK {
                return Err(self.format("it ends in the middle of a sparse map"));
            }
            for piece in more.sparse().iter().filter(|piece| !piece.is_empty()) {
                pieces.push((number(self, piece.offset())?, number(self, piece.length())?));
            }
            if pieces.len() > MAX_PIECES {
                return Err(self.format(&format!("a sparse file has more than {MAX_PIECES} pieces")));
            }
            extended = more.is_extended();
        }
        Ok((pieces, real))
    }

    /// The pieces of a PAX sparse file, if this is one.
    fn pax_pieces(&mut self, pax: &Pax) -> Result<Option<Pieces>, TarError> {
        let numbers = match (pax.sparse_major, pax.sparse_minor) {
            (Some(1), Some(0)) => self.map_in_data()?,
            (None | Some(0), _) if pax.sparse_size.is_some() => pax.sparse_numbers.clone(),
            (None, _) => return Ok(None),
            (major, minor) => {
                return Err(self.format(&format!("sparse format {major:?}.{minor:?} is not known")));
            }
        };
        let Some(real) = pax.sparse_size else {
            return Err(self.format("a sparse member without its real size"));
        };
        let pieces = numbers.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect();
        Ok(Some((pieces, real)))
    }

    /// Sparse format 1.0: decimal lines at the head of the data, filled up to a block.
    fn map_in_data(&mut self) -> Result<Vec<u64>, TarError> {
        let mut numbers = Vec::new();
        let mut wanted = None;
        let mut number = String::new();
        let mut block = [0; BLOCK];
        while wanted.is_none_or(|wanted| numbers.len() < wanted) {
            let mut filled = 0;
            while filled < BLOCK {
                match self.read_data(&mut block[filled..])? {
                    0 => return Err(self.format("it ends in the middle of a sparse map")),
                    read => filled += read,
                }
            }
            for &byte in &block {
                if wanted.is_some_and(|wanted| numbers.len() >= wanted) {
                    break;
                }
                if byte != b'\n' {
                    number.push(byte as char);
                    if number.len() > 20 {
                        return Err(self.format("a sparse map has no valid number"));
                    }
                    continue;
                }
                let value: u64 =
                    number.parse().map_err(|_| self.format("a sparse map has no valid number"))?;
                number.clear();
                if wanted.is_none() {
                    if value > MAX_PIECES as u64 {
                        return Err(self.format(&format!("a sparse file has more than {MAX_PIECES} pieces")));
                    }
                    wanted = Some(value as usize * 2);
                } else {
                    numbers.push(value);
                }
            }
        }
        Ok(numbers)
    }

    fn check_pieces(&self, pieces: &[(u64, u64)], size: u64) -> Result<(), TarError> {
        let mut end = 0_u64;
        let mut data = 0_u64;
        for &(offset, length) in pieces {
            let next = offset.checked_add(length);
            match next {
                Some(next) if offset >= end && next <= size => end = next,
                _ => return Err(self.format("the pieces of a sparse file overlap or exceed it")),
            }
            data += length;
        }
        if data != self.remaining {
            return Err(self.format("the pieces of a sparse file do not add up to its data"));
        }
        Ok(())
    }
}

fn trim_nul(mut bytes: Vec<u8>) -> Vec<u8> {
    while bytes.last() == Some(&0) {
        bytes.pop();
    }
    bytes
}

/// Fills the buffer as far as the reader goes.
pub(super) fn read_up_to(reader: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match reader.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// Records are `LENGTH KEY=VALUE\n`, the length counting all of it; values may hold any byte.
fn parse_pax(mut rest: &[u8]) -> Result<Pax, String> {
    const BAD: &str = "a PAX record is malformed";
    let mut pax = Pax::default();
    while !rest.is_empty() {
        let space = rest.iter().take(8).position(|&byte| byte == b' ').ok_or(BAD)?;
        let length: usize =
            std::str::from_utf8(&rest[..space]).ok().and_then(|digits| digits.parse().ok()).ok_or(BAD)?;
        if length <= space + 2 || length > rest.len() || rest[length - 1] != b'\n' {
            return Err(BAD.into());
        }
        let record = &rest[space + 1..length - 1];
        rest = &rest[length..];
        let equals = record.iter().position(|&byte| byte == b'=').ok_or(BAD)?;
        let (key, value) = (&record[..equals], &record[equals + 1..]);
        let number = || -> Result<u64, String> {
            std::str::from_utf8(value)
                .ok()
                .and_then(|digits| digits.parse().ok())
                .ok_or_else(|| format!("PAX record {} is not a number", String::from_utf8_lossy(key)))
        };
        match key {
            b"path" => pax.path = Some(value.to_vec()),
            b"linkpath" => pax.link = Some(value.to_vec()),
            b"size" => pax.size = Some(number()?),
            b"uid" => pax.uid = Some(number()?),
            b"gid" => pax.gid = Some(number()?),
            b"mtime" => pax.mtime = Some(parse_time(value).ok_or("PAX record mtime is not a time")?),
            b"GNU.sparse.major" => pax.sparse_major = Some(number()?),
            b"GNU.sparse.minor" => pax.sparse_minor = Some(number()?),
            b"GNU.sparse.name" => pax.sparse_name = Some(value.to_vec()),
            b"GNU.sparse.size" | b"GNU.sparse.realsize" => pax.sparse_size = Some(number()?),
            b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => pax.sparse_numbers.push(number()?),
            b"GNU.sparse.map" => {
                let list = std::str::from_utf8(value).map_err(|_| BAD)?;
                for part in list.split(',').filter(|part| !part.is_empty()) {
                    pax.sparse_numbers.push(part.parse().map_err(|_| BAD)?);
                }
            }
            _ => {
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                    pax.xattrs.push((name.to_vec(), value.to_vec()));
                }
            }
        }
        if pax.sparse_numbers.len() > 2 * MAX_PIECES {
            return Err(format!("a sparse file has more than {MAX_PIECES} pieces"));
        }
    }
    if pax.sparse_numbers.len() % 2 != 0 {
        return Err("a sparse map has an odd number of numbers".into());
    }
    Ok(pax)
}

/// `[-]SECONDS[.FRACTION]`, cut to nanoseconds.
fn parse_time(value: &[u8]) -> Option<(i64, u32)> {
    let text = std::str::from_utf8(value).ok()?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = whole.parse().ok()?;
    if !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let mut nanos = 0_u32;
    for position in 0..9 {
        nanos = nanos * 10 + u32::from(fraction.as_bytes().get(position).map_or(0, |digit| digit - b'0'));
    }
    if text.starts_with('-') && nanos > 0 {
        return Some((seconds.checked_sub(1)?, 1_000_000_000 - nanos));
    }
    Some((seconds, nanos))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(key: &str, value: &[u8]) -> Vec<u8> {
        let body = key.len() + value.len() + 3;
        let mut length = body + 1;
        while length != body + length.to_string().len() {
            length = body + length.to_string().len();
        }
        let mut bytes = format!("{length} {key}=").into_bytes();
        bytes.extend_from_slice(value);
        bytes.push(b'\n');
        bytes
    }

    fn header(kind: EntryType, path: &str, size: u64) -> Vec<u8> {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.as_mut_bytes()[..path.len()].copy_from_slice(path.as_bytes());
        header.set_size(size);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(7);
        header.set_cksum();
        header.as_bytes().to_vec()
    }

    fn member(kind: EntryType, path: &str, data: &[u8]) -> Vec<u8> {
        let mut bytes = header(kind, path, data.len() as u64);
        bytes.extend_from_slice(data);
        bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
        bytes
    }

    fn read(bytes: &[u8]) -> Result<Vec<(Member, Vec<u8>)>, String> {
        let text = |error| match error {
            TarError::Format { near, reason } => format!("{near}: {reason}"),
            TarError::Io(error) => error.to_string(),
        };
        let mut tarball = Tarball::new(bytes);
        let mut members = Vec::new();
        while let Some(member) = tarball.next_member().map_err(text)? {
            let mut data = Vec::new();
            let mut buffer = [0; 100];
            loop {
                match tarball.read_data(&mut buffer).map_err(text)? {
                    0 => break,
                    read => data.extend_from_slice(&buffer[..read]),
                }
            }
            members.push((member, data));
        }
        Ok(members)
    }

    #[test]
    fn pax_records_with_newlines_are_kept_whole() {
        let mut pax = record("SCHILY.xattr.security.capability", b"\x01\n\n=\x00x");
        pax.extend(record("path", "a\u{e4}/b".as_bytes()));
        pax.extend(record("mtime", b"-1.25"));
        pax.extend(record("uid", b"70000"));
        let mut bytes = member(EntryType::XHeader, "pax", &pax);
        bytes.extend(member(EntryType::Regular, "short", b"data"));
        bytes.extend([0; 1024]);
        let (member, data) = read(&bytes).unwrap().remove(0);
        assert_eq!(member.xattrs, [(b"security.capability".to_vec(), b"\x01\n\n=\x00x".to_vec())]);
        assert_eq!((member.path.as_slice(), member.uid), ("a\u{e4}/b".as_bytes(), 70000));
        assert_eq!(member.mtime, (-2, 750_000_000));
        assert_eq!(data, b"data");
    }

    #[test]
    fn each_sparse_format_gives_the_same_pieces() {
        let expected = Some(vec![(0, 4), (100, 3)]);
        let pax_file = |records: &[(&str, &str)], data: &[u8]| {
            let mut pax = Vec::new();
            for (key, value) in records {
                pax.extend(record(key, value.as_bytes()));
            }
            let mut bytes = member(EntryType::XHeader, "pax", &pax);
            bytes.extend(member(EntryType::Regular, "GNUSparseFile.0/f", data));
            bytes
        };
        let zero_zero = pax_file(
            &[
                ("GNU.sparse.size", "200"),
                ("GNU.sparse.offset", "0"),
                ("GNU.sparse.numbytes", "4"),
                ("GNU.sparse.offset", "100"),
                ("GNU.sparse.numbytes", "3"),
                ("path", "f"),
            ],
            b"abcdefg",
        );
        let zero_one = pax_file(
            &[("GNU.sparse.size", "200"), ("GNU.sparse.map", "0,4,100,3"), ("GNU.sparse.name", "f")],
            b"abcdefg",
        );
        let mut map = b"2\n0\n4\n100\n3\n".to_vec();
        map.resize(BLOCK, 0);
        map.extend_from_slice(b"abcdefg");
        let one_zero = pax_file(
            &[
                ("GNU.sparse.major", "1"),
                ("GNU.sparse.minor", "0"),
                ("GNU.sparse.realsize", "200"),
                ("GNU.sparse.name", "f"),
            ],
            &map,
        );
        for bytes in [zero_zero, zero_one, one_zero] {
            let (member, data) = read(&bytes).unwrap().remove(0);
            assert_eq!((member.path.as_slice(), member.size), (b"f".as_slice(), 200));
            assert_eq!(member.pieces, expected);
            assert_eq!(data, b"abcdefg");
        }
        let lying = pax_file(&[("GNU.sparse.size", "200"), ("GNU.sparse.map", "0,4,2,3")], b"abcdefg");
        assert!(read(&lying).unwrap_err().contains("overlap"));
        let short = pax_file(&[("GNU.sparse.size", "200"), ("GNU.sparse.map", "0,4")], b"abcdefg");
        assert!(read(&short).unwrap_err().contains("add up"));
    }

    #[test]
    fn extension_headers_cannot_fill_the_memory() {
        let mut bytes = header(EntryType::GNULongName, "././@LongLink", 1 << 40);
        bytes.resize(bytes.len() + BLOCK, b'a');
        assert!(read(&bytes).unwrap_err().contains("1099511627776 bytes"));
        let bytes = header(EntryType::XHeader, "pax", 1 << 33);
        assert!(read(&bytes).unwrap_err().contains("at most 1048576"));
    }

    #[test]
    fn ambiguous_and_broken_archives_are_errors() {
        let mut twice = member(EntryType::GNULongName, "././@LongLink", b"one\0");
        twice.extend(member(EntryType::GNULongName, "././@LongLink", b"two\0"));
        assert!(read(&twice).unwrap_err().contains("two long names"));
        let mut both = member(EntryType::GNULongName, "././@LongLink", b"one\0");
        both.extend(member(EntryType::XHeader, "pax", &record("path", b"two")));
        both.extend(member(EntryType::Regular, "three", b""));
        assert!(read(&both).unwrap_err().contains("both a GNU and a PAX"));
        let whole = member(EntryType::Regular, "named/file", &[7; 2000]);
        assert!(read(&whole[..1000]).unwrap_err().contains("named/file: it ends in the middle of a member"));
        assert!(read(&whole[..300]).unwrap_err().contains("middle of a header"));
        let mut flipped = whole.clone();
        flipped[3] ^= 1;
        assert!(read(&flipped).unwrap_err().contains("checksum"));
        assert!(read(&member(EntryType::XHeader, "pax", b"9 x")).unwrap_err().contains("malformed"));
        let dangling = member(EntryType::GNULongName, "././@LongLink", b"one\0");
        assert!(read(&dangling).unwrap_err().contains("describes the next member"));
    }

    #[test]
    fn links_have_no_data_whatever_their_size_says() {
        let mut bytes = header(EntryType::Link, "link", 600);
        bytes.extend(member(EntryType::Regular, "next", b"x"));
        let members = read(&bytes).unwrap();
        assert_eq!(members[0].0.kind, Kind::Hardlink);
        assert_eq!(members[1].0.path, b"next");
    }
}
