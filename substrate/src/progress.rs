// SPDX-License-Identifier: Apache-2.0
//! A spinner on stderr for what takes longer than a second, where a person looks at it.
use std::future::Future;
use std::io::IsTerminal as _;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Nothing is shown for what is done sooner.
const PATIENCE: Duration = Duration::from_secs(1);

/// Awaits something and shows `doing` with the elapsed time once it takes more than a second.
pub async fn during<T>(doing: impl Into<String>, work: impl Future<Output = T>) -> T {
    let mut spinner = Spinner::new(doing);
    tokio::pin!(work);
    let result = tokio::select! {
        result = &mut work => return result,
        () = tokio::time::sleep(PATIENCE) => { spinner.show(); work.await }
    };
    spinner.finish();
    result
}

/// A spinner whose text can change; hidden until [`Spinner::show`].
#[derive(Debug)]
pub struct Spinner {
    text: String,
    bar: Option<ProgressBar>,
}

impl Spinner {
    /// Not shown yet.
    pub fn new(text: impl Into<String>) -> Self {
        Self { text: text.into(), bar: None }
    }

    /// Shows it where stderr is a terminal.
    pub fn show(&mut self) {
        if self.bar.is_some() || !std::io::stderr().is_terminal() {
            return;
        }
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} ({elapsed})") {
            bar.set_style(style);
        }
        bar.set_message(self.text.clone());
        bar.enable_steady_tick(Duration::from_millis(120));
        self.bar = Some(bar);
    }

    /// Changes its text.
    pub fn say(&mut self, text: impl Into<String>) {
        self.text = text.into();
        if let Some(bar) = &self.bar {
            bar.set_message(self.text.clone());
        }
    }

    /// Takes it away.
    pub fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

impl Drop for Spinner {
    fn drop(&mut self) {
        self.finish();
    }
}
