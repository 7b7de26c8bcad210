// SPDX-License-Identifier: Apache-2.0
//! Images as others make and serve them: layouts by umoci, copied by skopeo into Debian's registry server.
//!
//! Needs the packages docker-registry, skopeo and umoci. Where one is missing the test says so; in CI that is a
//! failure.
use std::io::BufRead as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use atelet::image::{ImageError, ImageStore, Reference};
use serde_json::json;

use crate::support::*;

/// `user:secret`, as htpasswd -nbB writes it.
const HTPASSWD: &str = "user:$2y$05$W//0BEQQhaVQN/WbtWHrUuTJL2BPc4OQqiDYPaR4cbrDcYCMh1JC6\n";

fn have(tools: &[&str]) -> bool {
    let missing: Vec<_> = tools
        .iter()
        .filter(|tool| {
            let paths = std::env::var_os("PATH").unwrap_or_default();
            !std::env::split_paths(&paths).any(|dir| dir.join(tool).exists())
        })
        .collect();
    if missing.is_empty() {
        return true;
    }
    assert!(std::env::var_os("CI").is_none(), "missing {missing:?}: scripts/setup installs them");
    eprintln!("skipped: missing {missing:?}");
    false
}

fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

struct Server {
    child: Child,
    port: u16,
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Err(error) = self.child.kill().and_then(|()| self.child.wait()) {
            eprintln!("cannot stop the registry server: {error}");
        }
    }
}

/// Starts the registry server on a free port of a loopback address; `tls` are lines of its configuration.
fn serve(dir: &Path, address: &str, tls: &str) -> Server {
    let port = std::net::TcpListener::bind((address, 0)).unwrap().local_addr().unwrap().port();
    std::fs::create_dir_all(dir).unwrap();
    std::fs::write(dir.join("htpasswd"), HTPASSWD).unwrap();
    let config = format!(
        "version: 0.1\nlog: {{level: info}}\nstorage:\n  filesystem: {{rootdirectory: {root}/data}}\nhttp:\n  addr: \
         {address}:{port}\n{tls}auth:\n  htpasswd: {{realm: test, path: {root}/htpasswd}}\n",
        root = dir.display()
    );
    std::fs::write(dir.join("config.yml"), config).unwrap();
    let mut child = Command::new("docker-registry")
        .arg("serve")
        .arg(dir.join("config.yml"))
        .stderr(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = std::io::BufReader::new(child.stderr.take().unwrap()).lines();
    let server = Server { child, port };
    let mut seen = Vec::new();
    loop {
        let line = lines.next().unwrap_or_else(|| panic!("the registry server ended: {seen:?}")).unwrap();
        let is_listening = line.contains("listening on");
        seen.push(line);
        if is_listening {
            break;
        }
    }
    // It blocks when nobody reads its log.
    std::thread::spawn(move || lines.for_each(drop));
    server
}

/// An image of two layers, the upper one hiding something, made by umoci; gives the tree that it stands for.
fn make_layout(home: &Home) -> std::path::PathBuf {
    let layout = home.path("made").display().to_string();
    let image = format!("{layout}:latest");
    let bundle = home.path("bundle");
    let at = bundle.display().to_string();
    let root = bundle.join("rootfs");
    run("umoci", &["init", "--layout", &layout]);
    run("umoci", &["new", "--image", &image]);
    run("umoci", &["unpack", "--image", &image, &at]);
    std::fs::create_dir_all(root.join("etc")).unwrap();
    std::fs::create_dir_all(root.join("opt/gone")).unwrap();
    std::fs::write(root.join("etc/passwd"), "agent:x:1000:1000::/home/agent:/bin/sh\n").unwrap();
    std::fs::write(root.join("opt/gone/file"), "1").unwrap();
    std::fs::write(root.join("program"), vec![7; 100_000]).unwrap();
    std::fs::set_permissions(root.join("program"), std::fs::Permissions::from_mode(0o4755)).unwrap();
    std::os::unix::fs::chown(root.join("program"), Some(12), Some(34)).unwrap();
    std::fs::hard_link(root.join("program"), root.join("second-name")).unwrap();
    std::os::unix::fs::symlink("/program", root.join("link")).unwrap();
    xattr::set(root.join("program"), "user.note", b"kept").unwrap();
    run("umoci", &["repack", "--refresh-bundle", "--image", &image, &at]);
    std::fs::remove_dir_all(root.join("opt/gone")).unwrap();
    std::fs::write(root.join("opt/new"), "2").unwrap();
    run("umoci", &["repack", "--image", &image, &at]);
    let config = ["--config.user=agent", "--config.entrypoint=/program", "--config.workingdir=/opt"];
    run("umoci", &[&["config", "--image", &image], &config[..]].concat());
    root
}

/// Both trees hold the same names, kinds, owners, modes, link counts, sizes, times (almost) and contents.
fn same_tree(left: &Path, right: &Path) {
    let list = |dir: &Path| {
        let mut names: Vec<_> =
            std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    assert_eq!(list(left), list(right), "{}", left.display());
    for name in list(left) {
        let (left, right) = (left.join(&name), right.join(&name));
        let facts = |path: &Path| {
            let meta = std::fs::symlink_metadata(path).unwrap();
            let links = if meta.is_dir() { 0 } else { meta.nlink() };
            let size = if meta.is_file() { meta.len() } else { 0 };
            (meta.mode(), meta.uid(), meta.gid(), links, size, std::fs::read_link(path).ok())
        };
        assert_eq!(facts(&left), facts(&right), "{}", left.display());
        // Go rounds times to the nearest second.
        let time = |path: &Path| std::fs::symlink_metadata(path).unwrap().mtime();
        assert!(time(&left).abs_diff(time(&right)) <= 1, "{}", left.display());
        if left.is_symlink() {
            continue;
        }
        if left.is_dir() {
            same_tree(&left, &right);
        } else {
            assert_eq!(std::fs::read(&left).unwrap(), std::fs::read(&right).unwrap());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn images_of_real_tools_through_a_real_registry() {
    need_root!();
    if !have(&["docker-registry", "skopeo", "umoci"]) {
        return;
    }
    let home = Home::new();
    let expected = make_layout(&home);
    let server = serve(&home.path("registry"), "127.0.0.1", "");
    let host = format!("127.0.0.1:{}", server.port);
    let source = format!("oci:{}:latest", home.path("made").display());
    let push = |repository: &str, options: &[&str]| -> Reference {
        let target = format!("docker://{host}/{repository}:v1");
        let fixed = ["copy", "--quiet", "--dest-tls-verify=false", "--dest-creds", "user:secret"];
        run("skopeo", &[&fixed[..], options, &[&source, &target]].concat());
        format!("{host}/{repository}:v1").parse().unwrap()
    };
    let gzip = push("team/gzip", &[]);
    let docker = push("team/docker", &["--format", "v2s2"]);
    let zstd = push("team/zstd", &["--dest-compress-format", "zstd"]);
    let auths = json!({"tenant": {"auths": {&host: {"username": "user", "password": "secret"}}}});
    std::fs::write(home.path("auth.json"), auths.to_string()).unwrap();
    let mut config = home.config();
    config.credentials = Some(home.path("auth.json"));
    let store = ImageStore::open(config).await.unwrap();
    let mut layers = Vec::new();
    for reference in [&source.parse().unwrap(), &gzip, &docker, &zstd] {
        let image = ensure(&store, reference).await.unwrap();
        same_tree(&expected, &image.rootfs);
        assert_eq!(
            xattr::get(image.rootfs.join("program"), "user.note").unwrap().as_deref(),
            Some(&b"kept"[..])
        );
        assert_eq!(
            (image.config.entrypoint.as_slice(), image.user(None).unwrap().uid),
            (&["/program".into()][..], 1000)
        );
        layers.push(store.usage().layers);
    }
    assert_eq!(layers, [2, 2, 2, 2], "however they are packed, the layers are the same");
    let error = store.ensure("stranger", &gzip, |_| {}).await.unwrap_err().to_string();
    assert!(error.contains("stranger") && error.contains("no credentials"), "{error}");
    let missing = format!("{host}/team/none:v1").parse().unwrap();
    let error = ensure(&store, &missing).await.unwrap_err().to_string();
    assert!(error.contains("does not exist"), "{error}");

    // An archive by skopeo.
    let archive = home.path("image.tar").display().to_string();
    run("skopeo", &["copy", "--quiet", &source, &format!("oci-archive:{archive}:v1")]);
    let image = ensure(&store, &format!("oci-archive:{archive}:v1").parse().unwrap()).await.unwrap();
    same_tree(&expected, &image.rootfs);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_behind_tls_is_trusted_by_its_ca_only() {
    need_root!();
    if !have(&["docker-registry", "openssl"]) {
        return;
    }
    let home = Home::new();
    let dir = home.path("registry");
    std::fs::create_dir(&dir).unwrap();
    let (key, certificate) =
        (dir.join("key.pem").display().to_string(), dir.join("cert.pem").display().to_string());
    let names = [
        "-subj",
        "/CN=registry",
        "-addext",
        "subjectAltName=IP:127.0.0.2",
        "-addext",
        "basicConstraints=critical,CA:FALSE",
    ];
    let fixed =
        ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"];
    run("openssl", &[&fixed[..], &names[..], &["-keyout", &key, "-out", &certificate]].concat());
    let server = serve(&dir, "127.0.0.2", &format!("  tls: {{certificate: {certificate}, key: {key}}}\n"));
    let reference: Reference = format!("127.0.0.2:{}/a:v1", server.port).parse().unwrap();
    let mut config = home.config();
    config.registry.attempts = 1;
    let store = ImageStore::open(config.clone()).await.unwrap();
    let error = ensure(&store, &reference).await.unwrap_err().to_string();
    assert!(error.contains("UnknownIssuer") || error.contains("invalid peer certificate"), "{error}");
    drop(store);
    config.registry.ca_file = Some(certificate.into());
    let store = ImageStore::open(config).await.unwrap();
    // The server answers, so the connection stands; it wants credentials.
    let error = ensure(&store, &reference).await.unwrap_err();
    assert!(matches!(error, ImageError::Denied { .. }), "{error}");
}
