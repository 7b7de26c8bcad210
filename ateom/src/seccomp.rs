// SPDX-License-Identifier: Apache-2.0
//! Filters of system calls: from what a template says to a program of classic BPF (seccomp(2)), made on the host, so that
//! a guest's agent has only to install it. runsc makes its own of the same words.
//!
//! Where nothing is said, a container of a microVM gets what container engines give: a call passes unless it needs a
//! capability that the container lacks ([`GATED`]) or has an argument that opens what the others keep closed
//! ([`conditions`]). Calls that are newer than the list of names fail with ENOSYS, so that a C library falls back on older
//! ones, and nobody is let through who was not looked at.
//!
//! Not with a crate: `seccompiler` knows two outcomes for a program and no ranges.
use std::collections::{BTreeMap, BTreeSet};

use substrate_proto::system_calls;
use substrate_proto::types::Seccomp;

/// Calls that pass only where the container has one of the capabilities; those without any pass only by a rule.
const GATED: [(&[&str], &[&str]); 16] = [
    (
        &["SYS_ADMIN"],
        &[
            "fanotify_init",
            "fsconfig",
            "fsmount",
            "fsopen",
            "fspick",
            "listmount",
            "lookup_dcookie",
            "mount",
            "mount_setattr",
            "move_mount",
            "open_tree",
            "quotactl",
            "quotactl_fd",
            "setdomainname",
            "sethostname",
            "setns",
            "statmount",
            "umount2",
            "unshare",
        ],
    ),
    (&["SYS_ADMIN", "BPF"], &["bpf"]),
    (&["SYS_ADMIN", "PERFMON"], &["perf_event_open"]),
    (&["SYS_ADMIN", "SYSLOG"], &["syslog"]),
    (&["DAC_READ_SEARCH"], &["open_by_handle_at"]),
    (&["SYS_BOOT"], &["reboot"]),
    (&["SYS_CHROOT"], &["chroot"]),
    (&["SYS_MODULE"], &["delete_module", "finit_module", "init_module"]),
    (&["SYS_NICE"], &["get_mempolicy", "mbind", "set_mempolicy", "set_mempolicy_home_node"]),
    (&["SYS_PACCT"], &["acct"]),
    (&["SYS_PTRACE"], &["kcmp", "pidfd_getfd", "process_madvise"]),
    (&["SYS_RAWIO"], &["ioperm", "iopl"]),
    (&["SYS_TIME"], &["clock_settime", "settimeofday"]),
    (&["SYS_TTY_CONFIG"], &["vhangup"]),
    // Keys are not of any namespace; userfaultfd and io_uring have been ways out of kernels too often.
    (
        &[],
        &[
            "add_key",
            "keyctl",
            "request_key",
            "userfaultfd",
            "io_uring_enter",
            "io_uring_register",
            "io_uring_setup",
        ],
    ),
    (
        &[],
        &[
            "_sysctl",
            "kexec_file_load",
            "kexec_load",
            "migrate_pages",
            "move_pages",
            "pivot_root",
            "swapoff",
            "swapon",
            "sysfs",
            "uselib",
            "ustat",
        ],
    ),
];

/// CLONE_NEW… of linux/sched.h, but for time namespaces, which clone(2) cannot make.
const NEW_NAMESPACES: u32 = 0x7e02_0000;
/// AF_VSOCK: under some machine monitors the host is reached by it.
const VSOCK: u32 = 40;
/// Personalities that change nothing about protection (linux/personality.h): Linux, Linux of 32 bits, each with the old
/// uname, and the question which it is.
const PERSONALITIES: [u32; 5] = [0, 8, 0x2_0000, 0x2_0008, u32::MAX];

/// What a program answers (linux/seccomp.h).
mod outcome {
    pub const ALLOW: u32 = 0x7fff_0000;
    pub const KILL_PROCESS: u32 = 0x8000_0000;
    pub const fn errno(number: u32) -> u32 {
        0x0005_0000 | number
    }
}
const EPERM: u32 = 1;
const ENOSYS: u32 = 38;
/// Largest number of an error (linux/err.h).
const MAX_ERRNO: u32 = 4095;

/// AUDIT_ARCH_X86_64: microVMs are of no other.
const ARCHITECTURE: u32 = 0xc000_003e;
/// __X32_SYSCALL_BIT: calls of another interface, by numbers from here on.
const X32: u32 = 0x4000_0000;

/// A program that ends whoever makes a call: BPF_RET | BPF_K with SECCOMP_RET_KILL_PROCESS.
pub const REFUSE_ALL: [u8; 8] = [0x06, 0, 0, 0, 0, 0, 0, 0x80];

/// When a call meets an outcome. Only the lower half of an argument counts, as for the kernel with these calls.
#[derive(Debug, Clone, PartialEq, Eq)]
enum When {
    Always,
    /// An argument has one of these bits.
    HasAny(u8, u32),
    /// An argument is this.
    Is(u8, u32),
    /// An argument is none of these.
    IsNoneOf(u8, Vec<u32>),
}

type Calls = BTreeMap<u32, (When, u32)>;

fn action(name: &str, errno: u32) -> Result<u32, String> {
    match name {
        "allow" => Ok(outcome::ALLOW),
        "kill" => Ok(outcome::KILL_PROCESS),
        "errno" if errno <= MAX_ERRNO => Ok(outcome::errno(if errno == 0 { EPERM } else { errno })),
        "errno" => Err(format!("{errno} is no error number")),
        other => Err(format!("{other:?} is no action: write allow, errno or kill")),
    }
}

fn number(name: &str) -> Result<u32, String> {
    system_calls::number(name).ok_or_else(|| format!("{name:?} is no system call that is known"))
}

/// What the rules say, by number.
fn rules(filter: &Seccomp) -> Result<Calls, String> {
    let mut calls = Calls::new();
    for rule in &filter.rules {
        let outcome = action(&rule.action, rule.errno)?;
        for name in &rule.names {
            if calls.insert(number(name)?, (When::Always, outcome)).is_some() {
                return Err(format!("{name} is named twice"));
            }
        }
    }
    Ok(calls)
}

/// Checks a filter.
///
/// # Errors
/// What is wrong with it, for people.
pub fn check(filter: &Seccomp) -> Result<(), String> {
    let default = filter.default_action.as_str();
    let passes = matches!(default, "" | "allow");
    if !passes {
        action(default, 0)?;
    }
    let calls = rules(filter)?;
    if !passes && calls.values().all(|(_, of_rule)| *of_rule != outcome::ALLOW) {
        return Err("allows nothing: name what the program needs".to_owned());
    }
    Ok(())
}

/// Calls that pass or not by what they are asked for, in a container that must not make namespaces.
fn conditions(may_administrate: bool) -> Vec<(&'static str, When, u32)> {
    let refused = outcome::errno(EPERM);
    let mut found = vec![
        ("personality", When::IsNoneOf(0, PERSONALITIES.to_vec()), refused),
        ("socket", When::Is(0, VSOCK), refused),
    ];
    if !may_administrate {
        found.push(("clone", When::HasAny(0, NEW_NAMESPACES), refused));
        // Its flags are in memory, where no filter can look; whoever gets ENOSYS takes clone.
        found.push(("clone3", When::Always, outcome::errno(ENOSYS)));
    }
    found
}

/// What holds where nothing is said.
fn profile(capabilities: &[String]) -> Calls {
    let own: BTreeSet<String> = capabilities
        .iter()
        .map(|name| name.to_ascii_uppercase().trim_start_matches("CAP_").to_owned())
        .collect();
    let refused = GATED.iter().filter(|(any, _)| !any.iter().any(|name| own.contains(*name)));
    let refused =
        refused.flat_map(|(_, names)| *names).map(|name| (*name, When::Always, outcome::errno(EPERM)));
    let conditional = conditions(own.contains("SYS_ADMIN"));
    refused
        .chain(conditional)
        .filter_map(|(name, when, outcome)| Some((system_calls::number(name)?, (when, outcome))))
        .collect()
}

/// The program of a container's filter: `struct sock_filter`s as they are in memory.
///
/// # Errors
/// As [`check`].
pub fn program(filter: Option<&Seccomp>, capabilities: &[String]) -> Result<Vec<u8>, String> {
    let plain = Seccomp::default();
    let filter = filter.unwrap_or(&plain);
    check(filter)?;
    let default = filter.default_action.as_str();
    let mut calls = if default.is_empty() { profile(capabilities) } else { Calls::new() };
    calls.extend(rules(filter)?);
    let otherwise = if default.is_empty() { outcome::ALLOW } else { action(default, 0)? };
    let unknown = match default {
        "" | "errno" => outcome::errno(ENOSYS),
        _ => otherwise,
    };
    let mut code = Code::default();
    code.load(4);
    code.test(Code::EQUAL, ARCHITECTURE, 1, 0);
    code.answer(outcome::KILL_PROCESS);
    code.load(0);
    // Those of x32 are no calls of a kernel that has it off; where it is on, they would pass by another number.
    code.test(Code::NOT_BELOW, X32, 0, 1);
    code.answer(outcome::errno(ENOSYS));
    code.test(Code::ABOVE, system_calls::LAST, 0, 1);
    code.answer(unknown);
    for (number, (when, outcome)) in calls {
        code.call(number, &when, outcome);
    }
    code.answer(otherwise);
    Ok(code.bytes())
}

/// An instruction: `struct sock_filter`.
type Instruction = (u16, u8, u8, u32);

#[derive(Debug, Default)]
struct Code(Vec<Instruction>);

impl Code {
    // BPF_JMP | BPF_K with BPF_JEQ, BPF_JGT, BPF_JGE, BPF_JSET (linux/bpf_common.h).
    const EQUAL: u16 = 0x15;
    const ABOVE: u16 = 0x25;
    const NOT_BELOW: u16 = 0x35;
    const HAS_ANY: u16 = 0x45;

    /// Loads a word of `struct seccomp_data`: the number is at 0, the architecture at 4.
    fn load(&mut self, at: u32) {
        self.0.push((0x20, 0, 0, at));
    }

    /// Loads the lower half of an argument (little endian).
    fn load_argument(&mut self, argument: u8) {
        self.load(16 + 8 * u32::from(argument));
    }

    /// Skips as many instructions where it is so, and as many where not.
    fn test(&mut self, kind: u16, value: u32, where_so: u8, where_not: u8) {
        self.0.push((kind, where_so, where_not, value));
    }

    fn answer(&mut self, outcome: u32) {
        self.0.push((0x06, 0, 0, outcome));
    }

    /// What one call meets; others, and the call where it is not so, go on behind it with the number loaded.
    fn call(&mut self, number: u32, when: &When, outcome: u32) {
        let mut body = Self::default();
        match when {
            When::Always => {}
            When::HasAny(argument, bits) => {
                body.load_argument(*argument);
                body.test(Self::HAS_ANY, *bits, 0, 1);
            }
            When::Is(argument, value) => {
                body.load_argument(*argument);
                body.test(Self::EQUAL, *value, 0, 1);
            }
            When::IsNoneOf(argument, values) => {
                body.load_argument(*argument);
                for (at, value) in values.iter().enumerate() {
                    // Over the tests that are left, and the answer.
                    body.test(Self::EQUAL, *value, (values.len() - at) as u8, 0);
                }
            }
        }
        body.answer(outcome);
        if *when != When::Always {
            body.load(0);
        }
        self.test(Self::EQUAL, number, 0, body.0.len() as u8);
        self.0.append(&mut body.0);
    }

    fn bytes(&self) -> Vec<u8> {
        let bytes = |(code, so, not, value): &Instruction| {
            let mut bytes = [0; 8];
            bytes[..2].copy_from_slice(&code.to_ne_bytes());
            bytes[2..4].copy_from_slice(&[*so, *not]);
            bytes[4..].copy_from_slice(&value.to_ne_bytes());
            bytes
        };
        self.0.iter().flat_map(bytes).collect()
    }
}

#[cfg(test)]
mod tests {
    use substrate_proto::types::SeccompRule;

    use super::outcome::{ALLOW, KILL_PROCESS, errno};
    use super::*;

    fn rule(names: &[&str], action: &str, errno: u32) -> SeccompRule {
        SeccompRule {
            names: names.iter().map(|name| (*name).to_owned()).collect(),
            action: action.into(),
            errno,
        }
    }

    fn filter(default_action: &str, rules: Vec<SeccompRule>) -> Seccomp {
        Seccomp { default_action: default_action.into(), rules }
    }

    /// What a program says, as the kernel runs it.
    fn run(program: &[u8], arch: u32, number: u32, arguments: [u64; 2]) -> u32 {
        let (mut at, mut value) = (0, 0);
        let (code, []) = program.as_chunks::<8>() else { panic!("no whole instructions") };
        loop {
            let [c0, c1, so, not, k0, k1, k2, k3] = code[at];
            let operand = u32::from_ne_bytes([k0, k1, k2, k3]);
            let mut jump = |is_so: bool| at += usize::from(if is_so { so } else { not });
            match u16::from_ne_bytes([c0, c1]) {
                0x20 => {
                    value = match operand {
                        0 => number,
                        4 => arch,
                        16 => arguments[0] as u32,
                        24 => arguments[1] as u32,
                        other => panic!("reads at {other}"),
                    }
                }
                0x15 => jump(value == operand),
                0x25 => jump(value > operand),
                0x35 => jump(value >= operand),
                0x45 => jump(value & operand != 0),
                0x06 => return operand,
                other => panic!("instruction {other:#x}"),
            }
            at += 1;
        }
    }

    fn said(program: &[u8], call: &str, argument: u64) -> u32 {
        run(program, ARCHITECTURE, system_calls::number(call).unwrap(), [argument, 0])
    }

    fn of(capabilities: &[&str]) -> Vec<u8> {
        let capabilities: Vec<String> = capabilities.iter().map(ToString::to_string).collect();
        program(None, &capabilities).unwrap()
    }

    #[test]
    fn all_names_are_system_calls_and_are_there_once() {
        let mut seen = BTreeSet::new();
        let conditional = conditions(false).into_iter().map(|(name, ..)| name);
        for name in GATED.iter().flat_map(|(_, names)| *names).copied().chain(conditional) {
            assert!(system_calls::number(name).is_some(), "{name}");
            assert!(seen.insert(name), "{name} is there twice");
        }
    }

    #[test]
    fn where_nothing_is_said_a_call_needs_the_capability_that_it_is_for() {
        let plain = of(&["CHOWN", "SYS_CHROOT"]);
        for passes in
            ["read", "execve", "chroot", "ptrace", "seccomp", "landlock_restrict_self", "mseal", "clone"]
        {
            assert_eq!(said(&plain, passes, 0), ALLOW, "{passes}");
        }
        for refused in
            ["mount", "keyctl", "bpf", "unshare", "io_uring_setup", "reboot", "userfaultfd", "kexec_load"]
        {
            assert_eq!(said(&plain, refused, 0), errno(EPERM), "{refused}");
        }
        assert_eq!(said(&of(&[]), "chroot", 0), errno(EPERM));
        assert_eq!(said(&of(&["cap_bpf"]), "bpf", 0), ALLOW);
        let administrator = of(&["SYS_ADMIN"]);
        for passes in ["mount", "unshare", "bpf", "clone3", "syslog"] {
            assert_eq!(said(&administrator, passes, 0), ALLOW, "{passes}");
        }
        assert_eq!(said(&administrator, "keyctl", 0), errno(EPERM));
    }

    #[test]
    fn arguments_count_where_a_call_does_more_than_one_thing() {
        const NEW_USER: u64 = 0x1000_0000;
        const THREAD: u64 = 0x003d_0f00;
        let plain = of(&[]);
        for (call, argument, expected) in [
            ("clone", THREAD, ALLOW),
            ("clone", NEW_USER | THREAD, errno(EPERM)),
            ("clone3", 0, errno(ENOSYS)),
            ("socket", 2, ALLOW),
            ("socket", 40, errno(EPERM)),
            // The kernel takes an int.
            ("socket", (1 << 32) + 40, errno(EPERM)),
            ("personality", 0xffff_ffff, ALLOW),
            ("personality", 0x0002_0008, ALLOW),
            ("personality", 0x0004_0000, errno(EPERM)),
            // Behind one with a condition the number is looked at again.
            ("reboot", 2, errno(EPERM)),
        ] {
            assert_eq!(said(&plain, call, argument), expected, "{call}({argument:#x})");
        }
        assert_eq!(said(&of(&["SYS_ADMIN"]), "clone", NEW_USER), ALLOW);
    }

    #[test]
    fn calls_that_nobody_looked_at_do_not_pass() {
        for program in
            [of(&[]), program(Some(&filter("errno", vec![rule(&["read"], "allow", 0)])), &[]).unwrap()]
        {
            assert_eq!(run(&program, ARCHITECTURE, system_calls::LAST + 1, [0; 2]), errno(ENOSYS));
            assert_eq!(run(&program, ARCHITECTURE, X32, [0; 2]), errno(ENOSYS), "read of x32");
            // i386.
            assert_eq!(run(&program, 0x4000_0003, 0, [0; 2]), KILL_PROCESS);
        }
        let only_these = filter("allow", vec![rule(&["mkdir"], "errno", 0)]);
        let open = program(Some(&only_these), &[]).unwrap();
        assert_eq!(run(&open, ARCHITECTURE, system_calls::LAST + 1, [0; 2]), ALLOW);
        assert_eq!(run(&open, ARCHITECTURE, X32 + 83, [0; 2]), errno(ENOSYS), "mkdir of x32");
    }

    #[test]
    fn rules_come_before_what_holds_otherwise() {
        let rules = || {
            vec![rule(&["mkdir"], "errno", 0), rule(&["chmod"], "errno", 38), rule(&["reboot"], "kill", 0)]
        };
        let expected = [errno(EPERM), errno(38), KILL_PROCESS];
        for (default, keyctl, read) in
            [("", errno(EPERM), ALLOW), ("allow", ALLOW, ALLOW), ("errno", errno(EPERM), errno(EPERM))]
        {
            let mut rules = rules();
            rules.push(rule(&["mount"], "allow", 0));
            let program = program(Some(&filter(default, rules)), &[]).unwrap();
            assert_eq!(
                ["mkdir", "chmod", "reboot"].map(|call| said(&program, call, 0)),
                expected,
                "{default}"
            );
            assert_eq!(said(&program, "mount", 0), ALLOW, "{default}");
            assert_eq!([said(&program, "keyctl", 0), said(&program, "read", 0)], [keyctl, read], "{default}");
        }
        let deadly = program(Some(&filter("kill", vec![rule(&["read"], "allow", 0)])), &[]).unwrap();
        assert_eq!([said(&deadly, "read", 0), said(&deadly, "write", 0)], [ALLOW, KILL_PROCESS]);
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (wrong, word) in [
            (filter("", vec![rule(&["teleport"], "errno", 0)]), "teleport"),
            (filter("", vec![rule(&["read"], "explode", 0)]), "explode"),
            (filter("log", vec![]), "log"),
            (filter("", vec![rule(&["read"], "errno", 4096)]), "4096"),
            (filter("", vec![rule(&["read", "read"], "errno", 0)]), "twice"),
            (filter("kill", vec![rule(&["read"], "errno", 0)]), "nothing"),
        ] {
            let said = check(&wrong).unwrap_err();
            assert!(said.contains(word), "{said}");
            assert_eq!(program(Some(&wrong), &[]).unwrap_err(), said);
        }
        check(&filter("allow", vec![])).unwrap();
    }
}
