// SPDX-License-Identifier: Apache-2.0
//! Fault points: every step can be failed, or the control plane killed, before and after it.
//!
//! A step is only reachable through [`StepName`], and the kill matrix runs over [`StepName::ALL`]: a new step cannot be
//! added without entering it.

/// The steps of all workflows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum StepName {
    Place,
    EnsureImages,
    Activate,
    UndoActivate,
    Checkpoint,
    Release,
    Upload,
    CheckpointLive,
    DeleteRelease,
    Purge,
    Collect,
    /// Between a step's outcome and its commit there is nothing but this.
    Commit,
}

impl StepName {
    /// All of them.
    pub const ALL: [Self; 12] = [
        Self::Place,
        Self::EnsureImages,
        Self::Activate,
        Self::UndoActivate,
        Self::Checkpoint,
        Self::Release,
        Self::Upload,
        Self::CheckpointLive,
        Self::DeleteRelease,
        Self::Purge,
        Self::Collect,
        Self::Commit,
    ];
}

/// Which side of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum When {
    Before,
    After,
}

/// A place where something may be made to go wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FaultPoint {
    /// The step.
    pub step: StepName,
    /// Which side of it.
    pub when: When,
}

/// What goes wrong there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Injected {
    /// Nothing.
    Nothing,
    /// The step fails.
    Fail,
    /// The control plane dies: no further commit, no further call.
    Crash,
}

/// Decides at each fault point.
pub trait Faults: Send + Sync + 'static {
    /// What happens at this point, this time.
    fn hit(&self, point: FaultPoint) -> Injected;

    /// Whether a test undoes a rule, to see that it is noticed.
    #[cfg(test)]
    fn undoes(&self, _: Rule) -> bool {
        false
    }
}

/// Rules of order that only a test undoes.
#[cfg(test)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// P2: a node's copy may go only after the durable commit.
    DropAfterDurable,
    /// P1: a silent node is given up only when its lease has ended with the margin.
    WaitForTheLease,
}

/// Nothing goes wrong by itself.
#[derive(Debug, Default, Clone, Copy)]
pub struct NoFaults;

impl Faults for NoFaults {
    fn hit(&self, _: FaultPoint) -> Injected {
        Injected::Nothing
    }
}
