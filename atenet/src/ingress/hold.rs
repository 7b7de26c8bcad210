// SPDX-License-Identifier: Apache-2.0
//! When a held reply may go out: the decision of `checkpoint.onReply: sync`, without its input and output.
//!
//! ```text
//!   reply complete, its connection ended
//!        │
//!        ▼               committed, this generation
//!    checkpoint ───────────────────────────────────────────▶ release: sync
//!      ▲   │ anything else, or maxHold is over
//!      │   ▼
//!      │  look the actor up
//!      │   ├── its generation was ended by a snapshot (suspend, pause) ─▶ release: sync
//!      │   ├── that generation is gone otherwise ───────────▶ withhold (502): it was never answered
//!      └───┼── lives, maxHold not over, worth retrying
//!          └── lives, maxHold over, beyond maxHeap or not worth retrying ─▶ release: async
//! ```
//!
//! The rule that matters: a reply whose effects were lost is never released. Therefore every way out except a
//! committed snapshot passes through a look at the actor. A stop captures the memory after the last connection has
//! ended, so the snapshot that ended a generation holds every reply of it.
use std::time::Duration;

use substrate_proto::ateapi::ActorState;
use substrate_proto::types::Durability;

use super::routes::{OnReply, Route};

/// What a held reply waits for.
#[derive(Debug, Clone)]
pub(crate) struct Hold {
    pub(crate) uid: String,
    /// The copy that gave the reply.
    pub(crate) generation: u64,
    pub(crate) policy: OnReply,
}

/// How a checkpoint ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Attempt {
    /// A snapshot is committed. It is known to have begun after the call only if the copy lives, or if it is the one
    /// that ended the generation; an actor that has just fallen back to an older snapshot would name that one.
    Committed { generation: u64, durability: Durability, certain: bool },
    /// More memory than `maxHeap`.
    TooLarge(String),
    /// It may succeed when asked again.
    Transient(String),
    /// It will not.
    Failed(String),
    /// Not committed within `maxHold`.
    TooSlow,
}

/// What a look at the actor showed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Sight {
    /// The generation was ended by a snapshot.
    Captured(Durability),
    /// The copy runs, or is being stopped in order.
    Lives,
    /// The workload itself ended after its reply.
    Exited,
    /// The copy is gone; what it did is lost.
    Gone(String),
    /// The control plane cannot be asked; whether the worker itself still answers for this generation.
    Unknown { worker_answers: bool },
}

/// What to do with the reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Next {
    /// Let it go; `Err` says why only as `async`.
    Release(Result<(), String>),
    /// Look the actor up.
    Look,
    /// Ask for a checkpoint again.
    Again,
    /// Answer 502 instead, with the reason.
    Withhold(String),
}

impl Hold {
    /// After a checkpoint.
    pub(crate) fn after_attempt(&self, attempt: &Attempt) -> Next {
        match attempt {
            Attempt::Committed { generation, durability, certain: true }
                if *generation == self.generation =>
            {
                self.captured(*durability)
            }
            _ => Next::Look,
        }
    }

    /// After a look at the actor that followed `attempt`; `held` counts from the reply's completion.
    pub(crate) fn after_look(&self, attempt: &Attempt, sight: &Sight, held: Duration) -> Next {
        match sight {
            Sight::Captured(durability) => self.captured(*durability),
            Sight::Gone(reason) => Next::Withhold(reason.clone()),
            Sight::Exited => Next::Release(Err("the workload exited after its reply".into())),
            Sight::Unknown { worker_answers: false } => {
                Next::Withhold("neither the control plane nor the worker answers".into())
            }
            Sight::Lives | Sight::Unknown { worker_answers: true } => match attempt {
                Attempt::Failed(reason) => Next::Release(Err(format!("the checkpoint failed: {reason}"))),
                Attempt::TooLarge(reason) => {
                    Next::Release(Err(format!("the actor's memory is larger than maxHeap: {reason}")))
                }
                _ if held < self.policy.max_hold => Next::Again,
                Attempt::Transient(reason) => {
                    Next::Release(Err(format!("not committed within maxHold: {reason}")))
                }
                _ => Next::Release(Err(format!("not committed within maxHold ({:?})", self.policy.max_hold))),
            },
        }
    }

    /// What the actor's record says about this copy.
    pub(crate) fn sight(&self, route: &Route) -> Sight {
        if route.uid != self.uid {
            return Sight::Gone("the actor was deleted and made anew".into());
        }
        if let Some(last) =
            route.last.as_ref().filter(|last| last.ended && last.generation == self.generation)
        {
            return Sight::Captured(last.durability);
        }
        match route.state {
            _ if route.generation != self.generation => {
                Sight::Gone(format!("generation {} took over from an older snapshot", route.generation))
            }
            ActorState::Running | ActorState::Suspending | ActorState::Pausing | ActorState::Resuming => {
                Sight::Lives
            }
            ActorState::Exited => Sight::Exited,
            state => Sight::Gone(format!(
                "its worker was lost (now {}{}{})",
                state.as_str_name(),
                if route.reason.is_empty() { "" } else { ", " },
                route.reason
            )),
        }
    }

    fn captured(&self, durability: Durability) -> Next {
        let enough = durability == Durability::Durable || self.policy.durability == Durability::Node;
        if enough {
            Next::Release(Ok(()))
        } else {
            Next::Release(Err("its snapshot is on the node only, the policy asks for a durable one".into()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ingress::address::Key;
    use crate::ingress::routes::Last;

    const LONG: Duration = Duration::from_secs(3);
    const SHORT: Duration = Duration::from_millis(10);

    fn hold(durability: Durability) -> Hold {
        Hold {
            uid: "u".into(),
            generation: 5,
            policy: OnReply { sync: true, durability, max_hold: Duration::from_secs(2), max_heap: 1 << 20 },
        }
    }

    fn released_async(next: &Next) -> bool {
        matches!(next, Next::Release(Err(_)))
    }

    #[test]
    fn after_a_checkpoint() {
        let node = hold(Durability::Node);
        let committed = |generation, durability| Attempt::Committed { generation, durability, certain: true };
        let doubtful = Attempt::Committed { generation: 5, durability: Durability::Durable, certain: false };
        assert_eq!(node.after_attempt(&doubtful), Next::Look);
        assert_eq!(node.after_attempt(&committed(5, Durability::Node)), Next::Release(Ok(())));
        assert_eq!(node.after_attempt(&committed(5, Durability::Durable)), Next::Release(Ok(())));
        assert_eq!(node.after_attempt(&committed(6, Durability::Node)), Next::Look);
        let durable = hold(Durability::Durable);
        assert!(released_async(&durable.after_attempt(&committed(5, Durability::Node))));
        assert_eq!(durable.after_attempt(&committed(5, Durability::Durable)), Next::Release(Ok(())));
        let named = |of: fn(String) -> Attempt| of("x".into());
        for attempt in
            [Attempt::TooSlow, named(Attempt::Failed), named(Attempt::Transient), named(Attempt::TooLarge)]
        {
            assert_eq!(node.after_attempt(&attempt), Next::Look, "{attempt:?} must look first");
        }
    }

    #[test]
    fn after_a_look() {
        let hold = hold(Durability::Node);
        let transient = Attempt::Transient("busy".into());
        let failed = Attempt::Failed("no".into());
        let large = Attempt::TooLarge("1 GiB".into());
        assert!(released_async(&hold.after_look(&large, &Sight::Lives, SHORT)));
        assert_eq!(hold.after_look(&transient, &Sight::Lives, SHORT), Next::Again);
        assert!(released_async(&hold.after_look(&transient, &Sight::Lives, LONG)));
        assert!(released_async(&hold.after_look(&Attempt::TooSlow, &Sight::Lives, LONG)));
        assert!(released_async(&hold.after_look(&failed, &Sight::Lives, SHORT)));
        let unsure = Sight::Unknown { worker_answers: true };
        assert_eq!(hold.after_look(&transient, &unsure, SHORT), Next::Again);
        assert!(released_async(&hold.after_look(&transient, &unsure, LONG)));
        assert!(released_async(&hold.after_look(&transient, &Sight::Exited, SHORT)));
        for held in [SHORT, LONG] {
            for attempt in [&transient, &failed, &large, &Attempt::TooSlow] {
                let captured = Sight::Captured(Durability::Node);
                assert_eq!(hold.after_look(attempt, &captured, held), Next::Release(Ok(())));
                for lost in [Sight::Gone("lost".into()), Sight::Unknown { worker_answers: false }] {
                    let next = hold.after_look(attempt, &lost, held);
                    assert!(matches!(next, Next::Withhold(_)), "{attempt:?} {lost:?} {next:?}");
                }
            }
        }
    }

    #[test]
    fn what_a_record_means() {
        let hold = hold(Durability::Node);
        let base = Route {
            key: Key { atespace: "a".into(), name: "n".into() },
            uid: "u".into(),
            state: ActorState::Running,
            reason: String::new(),
            message: String::new(),
            generation: 5,
            endpoint: String::new(),
            revision: 1,
            wake_on_traffic: true,
            exit_code: None,
            checkpoint: None,
            last: None,
        };
        let last = |generation, ended| Some(Last { generation, durability: Durability::Durable, ended });
        let with = |state, generation, last| hold.sight(&Route { state, generation, last, ..base.clone() });
        assert_eq!(with(ActorState::Running, 5, None), Sight::Lives);
        assert_eq!(with(ActorState::Running, 5, last(5, false)), Sight::Lives);
        assert_eq!(with(ActorState::Suspending, 5, last(4, true)), Sight::Lives);
        assert_eq!(with(ActorState::Exited, 5, None), Sight::Exited);
        assert_eq!(with(ActorState::Suspended, 5, last(5, true)), Sight::Captured(Durability::Durable));
        assert_eq!(with(ActorState::Running, 6, last(5, true)), Sight::Captured(Durability::Durable));
        for (state, generation, last) in [
            (ActorState::Suspended, 5, last(5, false)),
            (ActorState::Suspended, 5, last(4, true)),
            (ActorState::Running, 6, last(5, false)),
            (ActorState::Running, 6, None),
            (ActorState::Crashed, 5, None),
            (ActorState::Deleting, 5, None),
        ] {
            assert!(matches!(with(state, generation, last.clone()), Sight::Gone(_)), "{state:?} {last:?}");
        }
        assert!(matches!(hold.sight(&Route { uid: "other".into(), ..base }), Sight::Gone(_)));
    }
}
