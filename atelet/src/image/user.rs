// SPDX-License-Identifier: Apache-2.0
//! Who a container runs as: `USER` and `runAs`, resolved inside the image as runc does.
//!
//! | Written | uid | gid | supplementary groups |
//! |---|---|---|---|
//! | nothing | 0 | 0 | those of the user with uid 0 |
//! | `name` or `uid` known in `/etc/passwd` | its uid | its gid | groups that list its name |
//! | unknown `uid` | it | 0 | none |
//! | `…:group` or `…:gid` | as above | that group | none |
//!
//! The two files are opened with `RESOLVE_IN_ROOT`: links in an image lead to places in the image, never out.
use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

/// Largest `/etc/passwd` or `/etc/group` read, bytes.
const MAX_FILE: u64 = 4 << 20;

/// Numeric identity of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// User id.
    pub uid: u32,
    /// Primary group id.
    pub gid: u32,
    /// Supplementary group ids, ascending.
    pub groups: Vec<u32>,
    /// Home directory, `/` where none is known.
    pub home: String,
}

/// Resolves `user` (`name|uid[:group|gid]`, empty for root) in the image at `rootfs`; the error says which part
/// failed.
pub(super) fn resolve(rootfs: &Path, user: &str) -> Result<User, String> {
    let passwd = read(rootfs, "etc/passwd")?;
    let group = read(rootfs, "etc/group")?;
    lookup(user, &passwd, &group)
}

fn read(rootfs: &Path, path: &str) -> Result<String, String> {
    let failed = |error: &dyn std::fmt::Display| format!("/{path} cannot be read: {error}");
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(rootfs, flags, Mode::empty()).map_err(|error| failed(&error))?;
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
    let file: File = match rustix::fs::openat2(&root, path, flags, Mode::empty(), resolve) {
        Ok(fd) => fd.into(),
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV) => return Ok(String::new()),
        Err(error) => return Err(failed(&error)),
    };
    let meta = file.metadata().map_err(|error| failed(&error))?;
    if !meta.is_file() {
        return Err(format!("/{path} is not a regular file"));
    }
    let mut bytes = Vec::new();
    file.take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(|error| failed(&error))?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(format!("/{path} is larger than {MAX_FILE} bytes"));
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

struct Account<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

fn accounts(passwd: &str) -> impl Iterator<Item = Account<'_>> {
    passwd.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next().filter(|name| !name.is_empty() && !name.starts_with('#'))?;
        let _password = fields.next()?;
        let uid = id(fields.next()?)?;
        let gid = id(fields.next()?)?;
        let _comment = fields.next();
        Some(Account { name, uid, gid, home: fields.next().unwrap_or_default() })
    })
}

/// Name, gid and members.
fn groups(group: &str) -> impl Iterator<Item = (&str, u32, &str)> {
    group.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next().filter(|name| !name.is_empty() && !name.starts_with('#'))?;
        let _password = fields.next()?;
        let gid = id(fields.next()?)?;
        Some((name, gid, fields.next().unwrap_or_default()))
    })
}

/// An id; the largest number means "no change" to the kernel.
fn id(text: &str) -> Option<u32> {
    text.bytes()
        .all(|byte| byte.is_ascii_digit())
        .then(|| text.parse().ok())
        .flatten()
        .filter(|&id: &u32| id != u32::MAX)
}

fn lookup(user: &str, passwd: &str, group: &str) -> Result<User, String> {
    let (who, group_name) = match user.split_once(':') {
        Some((who, group)) => (who, Some(group).filter(|group| !group.is_empty())),
        None => (user, None),
    };
    let who = if who.is_empty() { "0" } else { who };
    // A name wins over a number that looks the same, as in runc.
    let account = accounts(passwd)
        .find(|account| account.name == who)
        .or_else(|| id(who).and_then(|uid| accounts(passwd).find(|account| account.uid == uid)));
    let mut resolved = match (&account, id(who)) {
        (Some(account), _) => User {
            uid: account.uid,
            gid: account.gid,
            groups: Vec::new(),
            home: if account.home.is_empty() { "/".into() } else { account.home.into() },
        },
        (None, Some(uid)) => User { uid, gid: 0, groups: Vec::new(), home: "/".into() },
        (None, None) if who.bytes().all(|byte| byte.is_ascii_digit()) => {
            return Err(format!("`{who}` is not a valid uid"));
        }
        (None, None) => {
            return Err(format!("its /etc/passwd has no user `{who}`: use one that it has, or a number"));
        }
    };
    if let Some(name) = group_name {
        resolved.gid = groups(group)
            .find(|(known, ..)| *known == name)
            .map(|(_, gid, _)| gid)
            .or_else(|| id(name))
            .ok_or_else(|| {
                format!("its /etc/group has no group `{name}`: use one that it has, or a number")
            })?;
    } else if let Some(account) = account {
        resolved.groups = groups(group)
            .filter(|(_, _, members)| members.split(',').any(|member| member == account.name))
            .map(|(_, gid, _)| gid)
            .collect();
        resolved.groups.sort_unstable();
        resolved.groups.dedup();
    }
    Ok(resolved)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "# comment\nroot:x:0:0:root:/root:/bin/sh\nagent:x:1000:1001:,,,:/home/agent:/bin/sh\n\
                          broken:x:abc:1::/\n1000x:x:7:7::/seven:\nbare:x:9:9\n";
    const GROUP: &str =
        "root:x:0:\nagent:x:1001:\naudio:x:29:agent,other\nvideo:x:44:other,agent\nwheel:x:10:root\n";

    #[test]
    fn the_table_of_the_module_holds() {
        let user = |text: &str| {
            let user = lookup(text, PASSWD, GROUP).unwrap();
            (user.uid, user.gid, user.groups, user.home)
        };
        assert_eq!(user(""), (0, 0, vec![10], "/root".into()));
        assert_eq!(user("agent"), (1000, 1001, vec![29, 44], "/home/agent".into()));
        assert_eq!(user("1000"), (1000, 1001, vec![29, 44], "/home/agent".into()));
        assert_eq!(user("agent:video"), (1000, 44, vec![], "/home/agent".into()));
        assert_eq!(user("4711"), (4711, 0, vec![], "/".into()));
        assert_eq!(user("4711:4712"), (4711, 4712, vec![], "/".into()));
        assert_eq!(user("1000x"), (7, 7, vec![], "/seven".into()));
        assert_eq!(user("bare"), (9, 9, vec![], "/".into()));
        assert_eq!(user(":29"), (0, 29, vec![], "/root".into()));
    }

    #[test]
    fn what_is_unknown_is_named() {
        let fails = |text: &str| lookup(text, PASSWD, GROUP).unwrap_err();
        assert!(fails("nobody").contains("no user `nobody`"));
        assert!(fails("broken").contains("no user `broken`"));
        assert!(fails("agent:none").contains("no group `none`"));
        assert!(fails("4294967295").contains("not a valid uid"));
        assert!(fails("99999999999").contains("not a valid uid"));
        assert!(fails("-1").contains("no user `-1`"));
    }

    #[test]
    fn links_in_an_image_stay_in_the_image() {
        let dir = tempfile::tempdir().unwrap();
        let etc = dir.path().join("etc");
        std::fs::create_dir_all(dir.path().join("usr/lib")).unwrap();
        std::fs::create_dir(&etc).unwrap();
        assert_eq!(resolve(dir.path(), "").unwrap().home, "/", "no passwd at all");
        // Absolute, and with more `..` than there are directories: both mean places in the image.
        std::os::unix::fs::symlink("/usr/lib/passwd", etc.join("passwd")).unwrap();
        std::os::unix::fs::symlink("../../../../../usr/lib/group", etc.join("group")).unwrap();
        std::fs::write(dir.path().join("usr/lib/passwd"), "in:x:5:6::/in:\n").unwrap();
        std::fs::write(dir.path().join("usr/lib/group"), "g:x:8:in\n").unwrap();
        assert_eq!(
            resolve(dir.path(), "in").unwrap(),
            User { uid: 5, gid: 6, groups: vec![8], home: "/in".into() }
        );
        std::fs::remove_file(etc.join("passwd")).unwrap();
        std::os::unix::fs::symlink("/proc/self/root/etc/passwd", etc.join("passwd")).unwrap();
        assert!(resolve(dir.path(), "root").unwrap_err().contains("no user `root`"));
        std::fs::remove_file(etc.join("passwd")).unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            etc.join("passwd"),
            rustix::fs::FileType::Fifo,
            Mode::from_raw_mode(0o600),
            0,
        )
        .unwrap();
        assert!(resolve(dir.path(), "").unwrap_err().contains("not a regular file"), "and does not hang");
    }
}
