// SPDX-License-Identifier: Apache-2.0
//! The README's tour of the command line, as a newcomer types it, on a real machine.
use std::io::Write as _;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use substrate_integration::{Machine, binary, image};

/// What a command prints; it must succeed.
fn run(machine: &Machine, args: &[&str]) -> Result<String> {
    let output = machine.cli(args)?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "substrate {}: {}: {errors}", args.join(" "), output.status);
    Ok(String::from_utf8(output.stdout)?)
}

/// The README's own lines, without comments; what needs a terminal or does not end is run elsewhere in this file.
fn tour() -> Result<Vec<Vec<String>>> {
    let readme = std::fs::read_to_string(substrate_integration::workspace().join("README.md"))?;
    let (_, tour) = readme.split_once("## A tour of the command line").context("the README has no tour")?;
    let block = tour.split("```").nth(1).context("the tour has no commands")?;
    Ok(block
        .lines()
        .filter_map(|line| line.split('#').next()?.trim().strip_prefix("substrate "))
        .filter(|line| !line.contains(" -it ") && !line.contains(" -f "))
        .map(|line| line.split_whitespace().map(str::to_owned).collect())
        .collect())
}

#[tokio::test]
async fn the_tour_of_the_readme_goes_as_it_says() -> Result<()> {
    let machine = Machine::start(2, &[]).await?;
    let counter = image("counter")?;
    let mut said = Vec::new();
    for line in tour()? {
        let args: Vec<&str> = line
            .iter()
            .map(|word| if word.starts_with("oci:$PWD") { counter.as_str() } else { word })
            .collect();
        said.push((line.join(" "), run(&machine, &args)?));
    }
    let of = |start: &str| -> Vec<&str> {
        said.iter().filter(|(line, _)| line.starts_with(start)).map(|(_, text)| text.as_str()).collect()
    };
    let counts: Vec<serde_json::Value> =
        of("request").into_iter().map(serde_json::from_str).collect::<Result<_, _>>()?;
    ensure!(counts.len() == 2 && counts[0]["count"] == 1 && counts[1]["count"] == 2, "{counts:?}");
    ensure!(counts[0]["nonce"] == counts[1]["nonce"], "it was booted again: {counts:?}");
    ensure!(of("get actors")[0].contains("SUSPENDED"), "{said:?}");
    ensure!(of("describe")[0].contains("RUNNING"), "{said:?}");
    ensure!(of("events")[0].contains("Suspended"), "{said:?}");
    ensure!(run(&machine, &["get", "actors", "-o", "json"])?.contains("[]"), "delete left an actor");
    Ok(())
}

#[tokio::test]
async fn exec_cp_and_logs_reach_into_a_real_sandbox() -> Result<()> {
    let mut machine = Machine::start(1, &[]).await?;
    machine.counter("inside", |_| ()).await?;
    // Exit code and streams.
    let output = machine.cli(&["exec", "inside", "--", "/bin/sh", "-c", "echo out; echo err >&2; exit 7"])?;
    ensure!(output.status.code() == Some(7), "{output:?}");
    ensure!(output.stdout == b"out\n" && output.stderr.ends_with(b"err\n"), "{output:?}");
    // Standard input to its end.
    let mut child = Command::new(binary("substrate")?)
        .arg("--socket")
        .arg(machine.dir.join("run/ateapi.sock"))
        .args(["exec", "-i", "inside", "--", "/bin/cat"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let text = vec![b'x'; 300_000];
    let mut stdin = child.stdin.take().context("no stdin")?;
    let writer = {
        let text = text.clone();
        std::thread::spawn(move || stdin.write_all(&text))
    };
    let output = child.wait_with_output()?;
    writer.join().map_err(|_| anyhow::anyhow!("the writer panicked"))??;
    ensure!(output.status.success() && output.stdout == text, "{} bytes came back", output.stdout.len());
    // A terminal, as a person has one: script(1) gives it.
    let typed = format!(
        "{} --socket {} exec -it inside -- /bin/sh -c 'test -t 0 && test -t 1 && echo a terminal; exit 5'",
        binary("substrate")?.display(),
        machine.dir.join("run/ateapi.sock").display()
    );
    let output = Command::new("script").args(["-qec", &typed, "/dev/null"]).stdin(Stdio::null()).output()?;
    ensure!(output.status.code() == Some(5), "{output:?}");
    ensure!(String::from_utf8_lossy(&output.stdout).contains("a terminal"), "{output:?}");
    // Files in and out.
    let root = machine.dir.join("cp");
    std::fs::create_dir(&root)?;
    let (there, back) = (root.join("there"), root.join("back"));
    std::fs::write(&there, &text)?;
    let path = |path: &std::path::Path| path.to_string_lossy().into_owned();
    run(&machine, &["cp", &path(&there), "inside:/tmp/file"])?;
    run(&machine, &["cp", "inside:/tmp/file", &path(&back)])?;
    ensure!(std::fs::read(&back)? == text, "the file came back changed");
    ensure!(
        run(&machine, &["logs", "inside"])?.contains("listening on port 8080"),
        "its output is not in its log"
    );
    Ok(())
}
