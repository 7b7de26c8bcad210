// SPDX-License-Identifier: Apache-2.0
//! Capabilities of a container (capabilities(7)).
use std::collections::BTreeSet;

use substrate_proto::types::SecurityContext;

/// What a container has when nothing is said: the set that container engines give.
pub const DEFAULT: [&str; 14] = [
    "AUDIT_WRITE",
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "KILL",
    "MKNOD",
    "NET_BIND_SERVICE",
    "NET_RAW",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYS_CHROOT",
];

/// Every capability of Linux 6.
const ALL: [&str; 41] = [
    "AUDIT_CONTROL",
    "AUDIT_READ",
    "AUDIT_WRITE",
    "BLOCK_SUSPEND",
    "BPF",
    "CHECKPOINT_RESTORE",
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "IPC_LOCK",
    "IPC_OWNER",
    "KILL",
    "LEASE",
    "LINUX_IMMUTABLE",
    "MAC_ADMIN",
    "MAC_OVERRIDE",
    "MKNOD",
    "NET_ADMIN",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_RAW",
    "PERFMON",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYSLOG",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_CHROOT",
    "SYS_MODULE",
    "SYS_NICE",
    "SYS_PACCT",
    "SYS_PTRACE",
    "SYS_RAWIO",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "WAKE_ALARM",
];

/// The complete, sorted list for a security context, as Kubernetes reads it: `drop: [ALL]` empties the default set,
/// `add` adds, and what `drop` names is taken away from that.
///
/// # Errors
/// The name that is no capability.
pub fn resolve(context: Option<&SecurityContext>) -> Result<Vec<String>, String> {
    let empty = SecurityContext::default();
    let context = context.unwrap_or(&empty);
    let add = names(&context.add_capabilities)?;
    let drop = names(&context.drop_capabilities)?;
    let mut set: BTreeSet<&str> =
        if drop.contains("ALL") { BTreeSet::new() } else { DEFAULT.into_iter().collect() };
    if add.contains("ALL") {
        set.extend(ALL);
    }
    set.extend(add.iter().filter(|name| **name != "ALL"));
    Ok(set.into_iter().filter(|name| !drop.contains(name)).map(str::to_owned).collect())
}

fn names(list: &[String]) -> Result<BTreeSet<&'static str>, String> {
    list.iter()
        .map(|name| {
            let upper = name.to_ascii_uppercase();
            let plain = upper.strip_prefix("CAP_").unwrap_or(&upper);
            std::iter::once("ALL")
                .chain(ALL)
                .find(|known| *known == plain)
                .ok_or_else(|| format!("{name:?} is no capability (such as NET_BIND_SERVICE, or ALL)"))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolved(add: &[&str], drop: &[&str]) -> Result<Vec<String>, String> {
        resolve(Some(&SecurityContext {
            add_capabilities: add.iter().map(ToString::to_string).collect(),
            drop_capabilities: drop.iter().map(ToString::to_string).collect(),
            ..SecurityContext::default()
        }))
    }

    #[test]
    fn sets() {
        assert_eq!(resolve(None).unwrap(), DEFAULT);
        assert_eq!(resolved(&[], &["ALL"]).unwrap(), [] as [&str; 0]);
        assert_eq!(resolved(&["CAP_NET_ADMIN"], &["all"]).unwrap(), ["NET_ADMIN"]);
        assert_eq!(resolved(&["SYS_ADMIN"], &["NET_RAW"]).unwrap().len(), DEFAULT.len());
        assert!(!resolved(&["ALL"], &["SYS_ADMIN"]).unwrap().contains(&"SYS_ADMIN".to_owned()));
        assert_eq!(resolved(&["ALL"], &[]).unwrap().len(), 41);
        assert!(resolved(&["NET_ADMINN"], &[]).unwrap_err().contains("NET_ADMINN"));
    }
}
