// SPDX-License-Identifier: Apache-2.0
//! What a slot may do when: the pure core of its state machine.
//!
//! ```text
//!            Run, Restore            ready
//!   EMPTY ───────────────▶ STARTING ───────▶ RUNNING ◀──────────── KEEP_RUNNING done
//!     ▲                       │ failed          │  │  ▲────────────────────┐
//!     │                       ▼                 │  └──────────▶ CHECKPOINTING ── refused ─▶ RUNNING
//!     │◀── cgroup empty ── TERMINATING ◀────────┤ Terminate      │        │
//!     │                       ▲                 │                │ STOP   │ failed
//!     │                       │                 ▼                ▼        ▼
//!     │◀── Terminate ── EXITED, LOST ◀── main exits, sandbox dies       LOST
//!     │◀──────────────────────────── STOP done, cgroup empty ────┘
//! ```
//! * FROZEN is not a state of its own: the lease has passed, and whatever the slot does stands still.
//! * A generation that is lower than one already seen *of the same actor* is refused everywhere; generations of
//!   different actors are not comparable. One that served here and is gone is refused to start again.
//! * The slot holds its actor (`holds`) from the first process in its control group until the group was seen empty.
//!   EMPTY therefore means empty, whichever way it was reached.
//!
//! Each function either refuses and changes nothing, or changes the state and says what the shell must do.
use std::collections::{HashMap, VecDeque};

use substrate_proto::ateom::slot_status;
use substrate_proto::types::{Assignment, ExitStatus};

use crate::error::SlotError;
use crate::lease::{Lease, LeaseChange};

/// How many actors' generations are remembered; the oldest is forgotten (the node agent remembers more).
const REMEMBERED_ACTORS: usize = 4096;

/// What the slot does.
#[derive(Debug, Clone, PartialEq)]
pub enum Phase {
    /// Nothing is in it.
    Empty,
    /// Booting or restoring.
    Starting,
    /// Serving.
    Running,
    /// Writing a snapshot.
    Checkpointing {
        /// The sandbox ends with it.
        stop: bool,
    },
    /// The workload ended by itself.
    Exited(ExitStatus),
    /// The sandbox died under its workload.
    Lost(String),
    /// Being killed.
    Terminating,
    /// Cannot be emptied or prepared.
    Broken(String),
}

impl Phase {
    /// For messages.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Empty => "empty",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Checkpointing { .. } => "being checkpointed",
            Self::Exited(_) => "exited",
            Self::Lost(_) => "lost",
            Self::Terminating => "being terminated",
            Self::Broken(_) => "broken",
        }
    }
}

/// What to do with Run or Restore.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// Begin it.
    Begin,
    /// The same is under way: wait for it.
    Join,
    /// It was done before.
    Done,
}

/// What to do with Checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Checkpoint {
    /// Begin it.
    Begin,
    /// One is under way: wait for it (the shell checks that it is the same).
    Join,
}

/// What to do with Terminate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Terminate {
    /// Nothing of it is here.
    Done,
    /// Kill it, or wait for the killing that is under way.
    TearDown,
}

/// What to do with SetLease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeaseSet {
    /// As the lease says.
    Renewed(LeaseChange),
    /// A higher generation exists: this copy must go.
    Superseded,
}

/// What is remembered of an actor.
#[derive(Debug, Clone, Copy)]
struct Seen {
    generation: u64,
    /// It served here and is gone: a start that comes late or twice must not bring its past back.
    ended: bool,
}

/// The slot as plain values.
#[derive(Debug, Clone)]
pub struct State {
    /// What it does.
    pub phase: Phase,
    /// Whose it is; kept in every phase but `Empty`.
    pub assignment: Option<Assignment>,
    /// Until when.
    pub lease: Lease,
    /// Processes of the actor may exist.
    pub holds: bool,
    /// The next sandbox is created ahead.
    pub prepared: bool,
    /// The present copy has served: what it did since its snapshot is known outside.
    served: bool,
    seen: HashMap<String, Seen>,
    order: VecDeque<String>,
}

impl Default for State {
    fn default() -> Self {
        Self {
            phase: Phase::Empty,
            assignment: None,
            lease: Lease::default(),
            holds: false,
            prepared: false,
            served: false,
            seen: HashMap::new(),
            order: VecDeque::new(),
        }
    }
}

impl State {
    fn remember(&mut self, uid: &str, generation: u64) {
        if let Some(known) = self.seen.get_mut(uid) {
            if generation > known.generation {
                *known = Seen { generation, ended: false };
            }
            return;
        }
        if self.order.len() >= REMEMBERED_ACTORS
            && let Some(oldest) = self.order.pop_front()
        {
            self.seen.remove(&oldest);
        }
        self.seen.insert(uid.to_owned(), Seen { generation, ended: false });
        self.order.push_back(uid.to_owned());
    }

    fn refuse_stale(&self, uid: &str, generation: u64) -> Result<(), SlotError> {
        match self.seen.get(uid) {
            Some(known) if generation < known.generation => {
                Err(SlotError::Stale { actor: uid.to_owned(), asked: generation, known: known.generation })
            }
            _ => Ok(()),
        }
    }

    /// The highest generation seen of whoever is here; 0: nobody.
    pub fn highest_generation(&self) -> u64 {
        self.assignment
            .as_ref()
            .and_then(|owner| self.seen.get(&owner.actor_uid))
            .map_or(0, |known| known.generation)
    }

    /// Whether this assignment is the one in the slot.
    fn is(&self, assignment: &Assignment) -> bool {
        self.assignment.as_ref().is_some_and(|owner| {
            owner.actor_uid == assignment.actor_uid && owner.generation == assignment.generation
        })
    }

    fn occupied(&self) -> SlotError {
        let owner = self.assignment.clone().unwrap_or_default();
        SlotError::Occupied {
            actor: owner.actor_uid,
            generation: owner.generation,
            phase: self.phase.name().to_owned(),
        }
    }

    fn not_here(assignment: &Assignment) -> SlotError {
        SlotError::NotHere { actor: assignment.actor_uid.clone(), generation: assignment.generation }
    }

    /// Run or Restore.
    pub fn start(
        &mut self,
        assignment: &Assignment,
        deadline_ns: i64,
        now_ns: i64,
    ) -> Result<Start, SlotError> {
        self.refuse_stale(&assignment.actor_uid, assignment.generation)?;
        match &self.phase {
            Phase::Empty => {}
            Phase::Starting if self.is(assignment) => return Ok(Start::Join),
            Phase::Running | Phase::Checkpointing { .. } if self.is(assignment) => return Ok(Start::Done),
            Phase::Exited(exit) if self.is(assignment) => {
                return Err(SlotError::WorkloadExited(exit.clone()));
            }
            Phase::Broken(why) => return Err(SlotError::Broken(why.clone())),
            _ => return Err(self.occupied()),
        }
        if self
            .seen
            .get(&assignment.actor_uid)
            .is_some_and(|known| known.ended && known.generation == assignment.generation)
        {
            return Err(SlotError::Ended {
                actor: assignment.actor_uid.clone(),
                generation: assignment.generation,
            });
        }
        if now_ns >= deadline_ns {
            return Err(SlotError::LeaseExpired(assignment.actor_uid.clone()));
        }
        self.served = false;
        self.remember(&assignment.actor_uid, assignment.generation);
        self.phase = Phase::Starting;
        self.assignment = Some(assignment.clone());
        self.lease = Lease::new(deadline_ns);
        self.holds = true;
        Ok(Start::Begin)
    }

    /// Booted or restored, and ready. `false`: something else happened meanwhile.
    pub fn started(&mut self) -> bool {
        let starting = self.phase == Phase::Starting;
        if starting {
            self.phase = Phase::Running;
            self.served = true;
        }
        starting
    }

    /// Booting or restoring failed: what there is of it must go. `false`: something else happened meanwhile.
    pub fn start_failed(&mut self) -> bool {
        let starting = self.phase == Phase::Starting;
        if starting {
            self.phase = Phase::Terminating;
        }
        starting
    }

    /// Whether the gate may be open.
    pub fn serving(&self) -> bool {
        matches!(self.phase, Phase::Running | Phase::Checkpointing { stop: false }) && !self.lease.frozen()
    }

    /// Whether a process may be started in the actor for someone outside.
    pub fn check_exec(&self, assignment: &Assignment) -> Result<(), SlotError> {
        self.refuse_stale(&assignment.actor_uid, assignment.generation)?;
        if !self.is(assignment) {
            return Err(Self::not_here(assignment));
        }
        self.running_now(assignment)
    }

    fn running_now(&self, assignment: &Assignment) -> Result<(), SlotError> {
        match &self.phase {
            _ if self.lease.frozen() => Err(SlotError::LeaseExpired(assignment.actor_uid.clone())),
            Phase::Running | Phase::Checkpointing { stop: false } => Ok(()),
            Phase::Exited(exit) => Err(SlotError::WorkloadExited(exit.clone())),
            phase => Err(SlotError::NotNow {
                actor: assignment.actor_uid.clone(),
                phase: phase.name().to_owned(),
                hint: "retry when it runs".to_owned(),
            }),
        }
    }

    /// Checkpoint.
    pub fn checkpoint(&mut self, assignment: &Assignment, stop: bool) -> Result<Checkpoint, SlotError> {
        self.refuse_stale(&assignment.actor_uid, assignment.generation)?;
        if !self.is(assignment) {
            return Err(Self::not_here(assignment));
        }
        if matches!(self.phase, Phase::Checkpointing { .. }) {
            return Ok(Checkpoint::Join);
        }
        self.running_now(assignment)?;
        self.phase = Phase::Checkpointing { stop };
        Ok(Checkpoint::Begin)
    }

    /// A checkpoint was refused, or was made with the actor kept: it runs on. `false`: something else happened.
    pub fn checkpoint_over(&mut self) -> bool {
        let checkpointing = matches!(self.phase, Phase::Checkpointing { .. });
        if checkpointing {
            self.phase = Phase::Running;
        }
        checkpointing
    }

    /// The workload ended by itself, or its sandbox died. `true`: this was news, tear down what is left.
    pub fn ended(&mut self, phase: Phase) -> bool {
        match &self.phase {
            // A sandbox that is being stopped dies, and that is no news; but its workload may exit first.
            Phase::Checkpointing { stop: true } if !matches!(phase, Phase::Exited(_)) => false,
            Phase::Starting | Phase::Running | Phase::Checkpointing { .. } => {
                self.phase = phase;
                true
            }
            _ => false,
        }
    }

    /// A checkpoint failed and took the sandbox with it. `true`: this was news.
    pub fn checkpoint_lost(&mut self, why: String) -> bool {
        let checkpointing = matches!(self.phase, Phase::Checkpointing { .. });
        if checkpointing {
            self.phase = Phase::Lost(why);
        }
        checkpointing
    }

    /// Terminate.
    pub fn terminate(&mut self, assignment: &Assignment) -> Result<Terminate, SlotError> {
        let same_actor =
            self.assignment.as_ref().is_some_and(|owner| owner.actor_uid == assignment.actor_uid);
        if !same_actor {
            // A start of this copy that is still on its way must find it refused.
            self.remember(&assignment.actor_uid, assignment.generation);
            return Ok(Terminate::Done);
        }
        self.refuse_stale(&assignment.actor_uid, assignment.generation)?;
        self.remember(&assignment.actor_uid, assignment.generation);
        Ok(self.evict())
    }

    /// Ends whatever is here.
    fn evict(&mut self) -> Terminate {
        if self.holds {
            self.phase = Phase::Terminating;
            return Terminate::TearDown;
        }
        self.vacate();
        Terminate::Done
    }

    fn vacate(&mut self) {
        if let Some(owner) = self.assignment.as_ref().filter(|_| self.served)
            && let Some(known) = self.seen.get_mut(&owner.actor_uid)
            && known.generation == owner.generation
        {
            known.ended = true;
        }
        self.phase = Phase::Empty;
        self.assignment = None;
        self.lease = Lease::default();
    }

    /// The control group was seen empty, or could not be emptied.
    pub fn torn_down(&mut self, result: Result<(), String>) {
        match result {
            Ok(()) => {
                self.holds = false;
                self.prepared = false;
                if matches!(
                    self.phase,
                    Phase::Terminating | Phase::Broken(_) | Phase::Starting | Phase::Checkpointing { .. }
                ) {
                    self.vacate();
                }
            }
            // Still held: Terminate tries again.
            Err(why) => self.phase = Phase::Broken(why),
        }
    }

    /// SetLease.
    pub fn set_lease(
        &mut self,
        actor_uid: &str,
        generation: u64,
        deadline_ns: i64,
        now_ns: i64,
    ) -> Result<LeaseSet, SlotError> {
        self.refuse_stale(actor_uid, generation)?;
        let Some(owner) = self.assignment.as_ref().filter(|owner| owner.actor_uid == actor_uid) else {
            return Err(SlotError::NotHere { actor: actor_uid.to_owned(), generation });
        };
        if generation > owner.generation {
            self.remember(actor_uid, generation);
            self.evict();
            return Ok(LeaseSet::Superseded);
        }
        Ok(LeaseSet::Renewed(self.lease.renew(deadline_ns, now_ns)))
    }

    /// Time has passed.
    pub fn tick(&mut self, now_ns: i64) -> LeaseChange {
        if self.holds { self.lease.tick(now_ns) } else { LeaseChange::Nothing }
    }

    /// As the wire says it.
    pub fn wire_phase(&self) -> slot_status::Phase {
        use slot_status::Phase as Wire;
        match &self.phase {
            Phase::Starting | Phase::Running | Phase::Checkpointing { .. } if self.lease.frozen() => {
                Wire::Frozen
            }
            Phase::Empty => Wire::Empty,
            Phase::Starting => Wire::Starting,
            Phase::Running => Wire::Running,
            Phase::Checkpointing { .. } => Wire::Checkpointing,
            Phase::Exited(_) => Wire::Exited,
            Phase::Lost(_) => Wire::Lost,
            Phase::Terminating => Wire::Terminating,
            Phase::Broken(_) => Wire::Broken,
        }
    }
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
