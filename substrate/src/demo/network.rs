// SPDX-License-Identifier: Apache-2.0
//! A network namespace that stands for the internet: model server, test servers and a DNS server, reached from this
//! machine by a veth, so that no exemption from the egress rules is needed.
//!
//! ```text
//!  this machine                          namespace sbd<pid>
//!  sbd<pid>h  203.0.113.254 ── veth ──   203.0.113.1   DNS for the demo's names
//!             2001:db8:71::254           203.0.113.10  allowed names (and a neighbour that is not allowed)
//!                                        203.0.113.66  everything else: HTTP, HTTPS, DNS;  2001:db8:71::66 TCP
//! ```
//!
//! The addresses are those of documentation (RFC 5737, RFC 3849); the first of their three networks that this machine
//! does not use is taken.
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::process::Stdio;

use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};

use crate::failure::{Doing as _, Failure};

/// Name of the model server.
pub const MODEL: &str = "model.helpdesk.test";
/// Another allowed name, HTTPS, on the same address.
pub const DOCS: &str = "docs.helpdesk.test";
/// A name on the same address that is not allowed.
pub const NEIGHBOUR: &str = "neighbour.helpdesk.test";
/// A name that exists and is not allowed.
pub const DENIED: &str = "denied.helpdesk.test";

/// Addresses of one documentation network.
#[derive(Debug, Clone, Copy)]
pub struct Addresses {
    v4: [u8; 3],
    v6: u16,
}

impl Addresses {
    const ALL: [Self; 3] = [
        Self { v4: [203, 0, 113], v6: 0x71 },
        Self { v4: [198, 51, 100], v6: 0x72 },
        Self { v4: [192, 0, 2], v6: 0x73 },
    ];

    fn host(self, last: u8) -> Ipv4Addr {
        let [a, b, c] = self.v4;
        Ipv4Addr::new(a, b, c, last)
    }

    /// The DNS server.
    pub fn dns(self) -> SocketAddr {
        SocketAddr::from((self.host(1), 53))
    }

    /// Where the allowed names are.
    pub fn allowed(self) -> Ipv4Addr {
        self.host(10)
    }

    /// Where everything else is.
    pub fn elsewhere(self) -> Ipv4Addr {
        self.host(66)
    }

    /// This machine's address there.
    pub fn node(self) -> Ipv4Addr {
        self.host(254)
    }

    /// Everything else, IPv6.
    pub fn elsewhere_v6(self) -> Ipv6Addr {
        Ipv6Addr::new(0x2001, 0xdb8, self.v6, 0, 0, 0, 0, 0x66)
    }

    fn node_v6(self) -> Ipv6Addr {
        Ipv6Addr::new(0x2001, 0xdb8, self.v6, 0, 0, 0, 0, 0x254)
    }
}

/// The running internet.
pub struct Internet {
    /// Its addresses.
    pub addresses: Addresses,
    /// Whether this machine speaks IPv6.
    pub has_v6: bool,
    namespace: String,
    link: String,
    children: Vec<Child>,
}

impl Internet {
    /// Builds it. `names` are further names and their addresses for the DNS server.
    ///
    /// # Errors
    /// What could not be made, by the tool that refused.
    pub async fn start(scratch: &Path, examples: &Path, names: &[(String, IpAddr)]) -> Result<Self, Failure> {
        let addresses = free_addresses().await?;
        let pid = std::process::id();
        let mut internet = Self {
            addresses,
            has_v6: false,
            namespace: format!("sbd{pid}"),
            link: format!("sbd{pid}h"),
            children: Vec::new(),
        };
        // Whatever was made before a failure is taken away again.
        match internet.build(scratch, examples, names).await {
            Ok(()) => Ok(internet),
            Err(failure) => {
                internet.stop().await;
                Err(failure.context("cannot make the demo's internet"))
            }
        }
    }

    async fn build(
        &mut self,
        scratch: &Path,
        examples: &Path,
        names: &[(String, IpAddr)],
    ) -> Result<(), Failure> {
        let (namespace, link, at) = (self.namespace.clone(), self.link.clone(), self.addresses);
        let inner = format!("{link}i");
        ip(&["netns", "add", &namespace]).await?;
        ip(&["link", "add", &link, "type", "veth", "peer", "name", &inner, "netns", &namespace]).await?;
        ip(&["addr", "add", &format!("{}/24", at.node()), "dev", &link]).await?;
        ip(&["link", "set", &link, "up"]).await?;
        let there = ["-n", namespace.as_str()];
        for address in [at.dns().ip().to_string(), at.allowed().to_string(), at.elsewhere().to_string()] {
            ip(&[&there[..], &["addr", "add", &format!("{address}/24"), "dev", &inner]].concat()).await?;
        }
        ip(&[&there[..], &["link", "set", "lo", "up"]].concat()).await?;
        ip(&[&there[..], &["link", "set", &inner, "up"]].concat()).await?;
        let v6 = format!("{}/64", at.node_v6());
        let inner_v6 = format!("{}/64", at.elsewhere_v6());
        self.has_v6 = ip(&["-6", "addr", "add", &v6, "dev", &link, "nodad"]).await.is_ok()
            && ip(&[&there[..], &["-6", "addr", "add", &inner_v6, "dev", &inner, "nodad"]].concat())
                .await
                .is_ok();
        let (cert, key) = certificate(scratch).await?;
        let responder = examples.join("responder.py");
        let responder = responder.to_string_lossy().into_owned();
        let python = if Path::new("/usr/bin/python3").exists() { "/usr/bin/python3" } else { "python3" };
        self.spawn(&[python, &responder, "--host", "0.0.0.0", "--port", "80"]).await?;
        let tls = ["--tls-cert", cert.as_str(), "--tls-key", key.as_str()];
        self.spawn(&[&[python, &responder, "--host", "0.0.0.0", "--port", "443"], &tls[..]].concat()).await?;
        let exe = std::env::current_exe().doing(|| "cannot tell this program's path".to_owned())?;
        let mut helper = vec![exe.to_string_lossy().into_owned(), "demo-internet".to_owned()];
        for dns in [at.dns(), SocketAddr::from((at.elsewhere(), 53))] {
            helper.extend(["--dns".to_owned(), dns.to_string()]);
        }
        if self.has_v6 {
            helper.extend(["--tcp".to_owned(), SocketAddr::from((at.elsewhere_v6(), 443)).to_string()]);
        }
        let own = [
            (MODEL, at.allowed()),
            (DOCS, at.allowed()),
            (NEIGHBOUR, at.allowed()),
            (DENIED, at.elsewhere()),
        ];
        let own = own.map(|(name, address)| (name.to_owned(), IpAddr::from(address)));
        for (name, address) in own.iter().chain(names) {
            helper.extend(["--name".to_owned(), format!("{name}={address}")]);
        }
        let helper: Vec<&str> = helper.iter().map(String::as_str).collect();
        self.spawn(&helper).await
    }

    /// Starts a server inside and waits for its first line, which says that it listens.
    async fn spawn(&mut self, command: &[&str]) -> Result<(), Failure> {
        let shown = command.join(" ");
        let mut child = Command::new("ip")
            .args(["netns", "exec", &self.namespace])
            .args(command)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .doing(|| format!("cannot start {shown}"))?;
        let stdout = child.stdout.take();
        self.children.push(child);
        let stdout = stdout.ok_or_else(|| Failure::general(format!("{shown} has no output")))?;
        let mut line = String::new();
        let mut stdout = BufReader::new(stdout);
        let read = stdout.read_line(&mut line);
        let count = tokio::time::timeout(std::time::Duration::from_secs(20), read)
            .await
            .doing(|| format!("{shown} did not say that it listens"))?
            .doing(|| format!("cannot read from {shown}"))?;
        if count == 0 {
            return Err(Failure::general(format!("{shown} ended at once")));
        }
        Ok(())
    }

    /// Its namespace.
    pub fn name(&self) -> &str {
        &self.namespace
    }

    /// Leaves its servers running.
    pub fn keep(&mut self) {
        self.children.drain(..).for_each(std::mem::forget);
    }

    /// Takes it away; what does not go is said.
    pub async fn stop(&mut self) {
        for child in &mut self.children {
            if let Err(error) = child.kill().await {
                eprintln!("substrate: cannot end a server of the demo: {error}");
            }
        }
        self.children.clear();
        // The link goes with the namespace; one that was made without a peer is removed by name.
        if let Err(failure) = ip(&["netns", "del", &self.namespace]).await {
            eprintln!("{}", failure.text());
        }
        if Path::new("/sys/class/net").join(&self.link).exists()
            && let Err(failure) = ip(&["link", "del", &self.link]).await
            && Path::new("/sys/class/net").join(&self.link).exists()
        {
            eprintln!("{}", failure.text());
        }
    }
}

async fn free_addresses() -> Result<Addresses, Failure> {
    for addresses in Addresses::ALL {
        let net = format!("{}/24", addresses.host(0));
        if ip(&["route", "show", "to", "root", &net]).await?.trim().is_empty() {
            return Ok(addresses);
        }
    }
    Err(Failure::general("all three documentation networks (RFC 5737) are in use on this machine").with_way_out(
        "look at `ip route` and `ip netns`; earlier demos that were killed leave namespaces named sbd<pid>: `ip netns del` them",
    ))
}

async fn ip(args: &[&str]) -> Result<String, Failure> {
    let output = Command::new("ip").args(args).stdin(Stdio::null()).output().await.map_err(|error| {
        Failure::general(format!("cannot run ip: {error}"))
            .with_way_out("install it: apt-get install -y iproute2")
    })?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(Failure::general(format!(
        "ip {}: {}",
        args.join(" "),
        String::from_utf8_lossy(&output.stderr).trim()
    )))
}

/// A certificate for the demo's HTTPS server: of its own making, so callers do not check it; what is shown is that the
/// proxy looks at the name in the greeting.
async fn certificate(scratch: &Path) -> Result<(String, String), Failure> {
    let cert = scratch.join("cert.pem").to_string_lossy().into_owned();
    let key = scratch.join("key.pem").to_string_lossy().into_owned();
    let subject = format!("/CN={DOCS}");
    let output = Command::new("openssl")
        .args([
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-nodes",
            "-days",
            "2",
        ])
        .args(["-subj", &subject, "-keyout", &key, "-out", &cert])
        .stdin(Stdio::null())
        .output()
        .await
        .map_err(|error| {
            Failure::general(format!("cannot run openssl: {error}"))
                .with_way_out("install it: apt-get install -y openssl")
        })?;
    if output.status.success() {
        return Ok((cert, key));
    }
    Err(Failure::general(format!("openssl req: {}", String::from_utf8_lossy(&output.stderr).trim())))
}
