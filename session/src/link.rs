// SPDX-License-Identifier: Apache-2.0
//! One end of a link: frames go in, come out at the other end once and in order, whatever happens to the connections
//! in between. No I/O.
//!
//! Each end numbers what it sends from 1, keeps it until the other has acknowledged it, and chains a digest over it. A
//! new connection begins with each end saying how far it has *received* and the digest there ([`Position`]). The
//! sender compares that digest with its own at the same number ([`Link::accepts`]); if it is the same, both have the
//! same past, and the sender goes on right there ([`Link::resume`]): nothing is lost and nothing comes twice.
//!
//! One end lives in a sandbox and may come back in an *older* state (a node was lost, a checkpoint was reverted). As
//! long as nothing that the other end knows of was forgotten, that looks like a lost connection and heals like one.
//! Otherwise a number is out of what the other end keeps, or the digests differ because the past was another one;
//! then [`Link::accepts`] says no and both ends begin a new link. The digest is what makes this certain: a copy
//! that came back and has said other things since may well have reached the same numbers.
use std::collections::VecDeque;

use bytes::Bytes;
use ring::digest::{Context, SHA256};
use substrate_proto::session::Position;

/// Length of a digest.
const DIGEST: usize = 32;

/// SHA-256 over the digest before and the frame.
type Digest = [u8; DIGEST];

fn chain(before: &Digest, frame: &[u8]) -> Digest {
    let mut context = Context::new(&SHA256);
    context.update(before);
    context.update(frame);
    let mut digest = [0; DIGEST];
    digest.copy_from_slice(context.finish().as_ref());
    digest
}

/// What the other end may not do; the connection is given up, the link is not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// A frame is missing, or came twice on one connection.
    #[error("frame {got} came where {expected} was due")]
    Order {
        /// Its number.
        got: u64,
        /// The next one.
        expected: u64,
    },
    /// An acknowledgement of what was never sent.
    #[error("frame {got} was acknowledged, {last} is the last that was sent")]
    Acknowledged {
        /// Its number.
        got: u64,
        /// The last one.
        last: u64,
    },
}

/// A frame on its way out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outgoing {
    /// Its number; 0: only an acknowledgement.
    pub sequence: u64,
    /// The last number received.
    pub acknowledged: u64,
    /// The frame.
    pub frame: Bytes,
}

#[derive(Debug, Clone)]
struct Kept {
    frame: Bytes,
    /// After this frame.
    digest: Digest,
}

/// One end.
#[derive(Debug, Clone, Default)]
pub struct Link {
    id: u64,
    /// Frames up to here were acknowledged; the digest there.
    acknowledged: u64,
    base: Digest,
    /// What follows them.
    kept: VecDeque<Kept>,
    kept_bytes: usize,
    /// How many of the kept ones went out on the present connection.
    written: usize,
    received: u64,
    digest: Digest,
    /// Bytes received since the last acknowledgement went out; frames without any count as one.
    owed: usize,
}

impl Link {
    /// A new link. Id 0 is no link: it accepts nothing.
    pub fn new(id: u64) -> Self {
        Self { id, ..Self::default() }
    }

    /// Which link it is.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Gives a link that never was one its id: what waits in it is kept. False if it is one already.
    pub fn begin(&mut self, id: u64) -> bool {
        let is_new = self.id == 0;
        if is_new {
            self.id = id;
        }
        is_new
    }

    /// Bytes kept until they are acknowledged.
    pub fn kept_bytes(&self) -> usize {
        self.kept_bytes
    }

    /// How far this end has received.
    pub fn position(&self) -> Position {
        Position { link: self.id, received: self.received, digest: self.digest.to_vec() }
    }

    /// Whether the other end, which stands there, has the same past as this one.
    pub fn accepts(&self, other: &Position) -> bool {
        self.id != 0
            && other.link == self.id
            && self.digest_at(other.received) == Some(other.digest.as_slice())
    }

    fn digest_at(&self, sequence: u64) -> Option<&[u8]> {
        let beyond = sequence.checked_sub(self.acknowledged)?;
        match usize::try_from(beyond).ok()?.checked_sub(1) {
            None => Some(&self.base),
            Some(index) => self.kept.get(index).map(|kept| kept.digest.as_slice()),
        }
    }

    /// Goes on over a new connection with the other end at a position that it accepts.
    pub fn resume(&mut self, other: &Position) {
        self.acknowledge(other.received);
        self.written = 0;
        self.owed = 0;
    }

    fn acknowledge(&mut self, sequence: u64) {
        while self.acknowledged < sequence {
            let Some(kept) = self.kept.pop_front() else { return };
            self.acknowledged += 1;
            self.kept_bytes -= kept.frame.len();
            self.base = kept.digest;
            self.written = self.written.saturating_sub(1);
        }
    }

    /// Takes a frame to send.
    pub fn push(&mut self, frame: Bytes) {
        let before = self.kept.back().map_or(self.base, |kept| kept.digest);
        self.kept_bytes += frame.len();
        self.kept.push_back(Kept { digest: chain(&before, &frame), frame });
    }

    /// Whether there is a frame to write.
    pub fn has_frame(&self) -> bool {
        self.written < self.kept.len()
    }

    /// Bytes that the other end keeps because their acknowledgement did not go out yet.
    pub fn owed(&self) -> usize {
        self.owed
    }

    /// The next to write on the present connection; an acknowledgement alone, if one is owed and there is no frame.
    pub fn next_outgoing(&mut self) -> Option<Outgoing> {
        let next = self.kept.get(self.written).map(|kept| kept.frame.clone());
        if next.is_none() && self.owed == 0 {
            return None;
        }
        self.owed = 0;
        let acknowledged = self.received;
        Some(match next {
            None => Outgoing { sequence: 0, acknowledged, frame: Bytes::new() },
            Some(frame) => {
                self.written += 1;
                Outgoing { sequence: self.acknowledged + self.written as u64, acknowledged, frame }
            }
        })
    }

    /// Takes in what came over the present connection; the frame, if it was one.
    ///
    /// # Errors
    /// [`Violation`]: the connection is to be given up.
    pub fn receive(&mut self, incoming: Outgoing) -> Result<Option<Bytes>, Violation> {
        let last = self.acknowledged + self.written as u64;
        if incoming.acknowledged > last {
            return Err(Violation::Acknowledged { got: incoming.acknowledged, last });
        }
        if incoming.sequence != 0 && incoming.sequence != self.received + 1 {
            return Err(Violation::Order { got: incoming.sequence, expected: self.received + 1 });
        }
        self.acknowledge(incoming.acknowledged);
        if incoming.sequence == 0 {
            return Ok(None);
        }
        self.received = incoming.sequence;
        self.digest = chain(&self.digest, &incoming.frame);
        self.owed += incoming.frame.len().max(1);
        Ok(Some(incoming.frame))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// An end and what its user knows; both are in a snapshot of it.
    #[derive(Clone, Default)]
    struct End {
        link: Link,
        said: Vec<Bytes>,
        heard: Vec<Bytes>,
    }

    impl End {
        fn new(id: u64) -> Self {
            Self { link: Link::new(id), ..Self::default() }
        }

        fn say(&mut self, what: Bytes) {
            self.said.push(what.clone());
            self.link.push(what);
        }
    }

    #[derive(Debug, Clone)]
    enum Step {
        Say {
            hub: bool,
            what: u8,
        },
        /// One end writes; so many of what it wrote arrive later.
        Write {
            hub: bool,
        },
        Arrive {
            hub: bool,
        },
        /// The connection breaks: what is under way is lost.
        Break,
        Snapshot,
        /// The shim comes back as it was in one of the snapshots.
        Restore(usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (any::<bool>(), 0..4_u8).prop_map(|(hub, what)| Step::Say { hub, what }),
            6 => any::<bool>().prop_map(|hub| Step::Write { hub }),
            6 => any::<bool>().prop_map(|hub| Step::Arrive { hub }),
            1 => Just(Step::Break),
            1 => Just(Step::Snapshot),
            1 => any::<usize>().prop_map(Step::Restore),
        ]
    }

    struct World {
        hub: End,
        shim: End,
        snapshots: Vec<End>,
        to_hub: VecDeque<Outgoing>,
        to_shim: VecDeque<Outgoing>,
        connected: bool,
        links: u64,
        fresh: u32,
    }

    impl World {
        fn new() -> Self {
            let (hub, shim) = (End::new(1), End::new(1));
            let snapshots = vec![shim.clone()];
            let (to_hub, to_shim) = (VecDeque::new(), VecDeque::new());
            Self { hub, shim, snapshots, to_hub, to_shim, connected: false, links: 1, fresh: 0 }
        }

        fn disconnect(&mut self) {
            self.connected = false;
            self.to_hub.clear();
            self.to_shim.clear();
        }

        fn connect(&mut self) {
            if self.connected {
                return;
            }
            let (of_hub, of_shim) = (self.hub.link.position(), self.shim.link.position());
            if self.hub.link.accepts(&of_shim) && self.shim.link.accepts(&of_hub) {
                self.hub.link.resume(&of_shim);
                self.shim.link.resume(&of_hub);
            } else {
                self.links += 1;
                self.fresh += 1;
                self.hub = End::new(self.links);
                self.shim = End::new(self.links);
            }
            self.connected = true;
        }

        fn take(&mut self, step: &Step) {
            match step {
                Step::Say { hub, what } => {
                    let what = Bytes::copy_from_slice(&[*what]);
                    if *hub { self.hub.say(what) } else { self.shim.say(what) }
                }
                Step::Write { hub } => {
                    self.connect();
                    let (end, way) = if *hub {
                        (&mut self.hub, &mut self.to_shim)
                    } else {
                        (&mut self.shim, &mut self.to_hub)
                    };
                    way.extend(end.link.next_outgoing());
                }
                Step::Arrive { hub } => {
                    self.connect();
                    let (end, way) = if *hub {
                        (&mut self.hub, &mut self.to_hub)
                    } else {
                        (&mut self.shim, &mut self.to_shim)
                    };
                    if let Some(incoming) = way.pop_front() {
                        let heard = end.link.receive(incoming).expect("an honest peer keeps the order");
                        end.heard.extend(heard);
                    }
                }
                Step::Break => self.disconnect(),
                Step::Snapshot => self.snapshots.push(self.shim.clone()),
                Step::Restore(which) => {
                    self.shim = self.snapshots[which % self.snapshots.len()].clone();
                    self.disconnect();
                }
            }
        }

        /// Once both ends agreed to go on: each has heard a beginning of what the other has said.
        fn check(&self) {
            if self.connected {
                assert!(self.shim.said.starts_with(&self.hub.heard), "the hub heard what was not said");
                assert!(self.hub.said.starts_with(&self.shim.heard), "the shim heard what was not said");
            }
        }

        /// Everything said arrives.
        fn settle(&mut self) {
            self.connect();
            let busy = |end: &End| end.link.has_frame() || end.link.owed() > 0;
            while busy(&self.hub) || busy(&self.shim) || !self.to_hub.is_empty() || !self.to_shim.is_empty() {
                for hub in [true, false] {
                    self.take(&Step::Write { hub });
                    self.take(&Step::Arrive { hub: !hub });
                }
            }
            assert_eq!(self.hub.heard, self.shim.said);
            assert_eq!(self.shim.heard, self.hub.said);
            assert_eq!((self.hub.link.kept_bytes(), self.shim.link.kept_bytes()), (0, 0));
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

        #[test]
        fn nothing_is_lost_doubled_or_swapped(steps in prop::collection::vec(step(), 1..120)) {
            let mut world = World::new();
            for step in &steps {
                world.take(step);
                world.check();
            }
            world.settle();
        }

        #[test]
        fn without_older_states_a_link_lasts_for_ever(steps in prop::collection::vec(step(), 1..120)) {
            let mut world = World::new();
            for step in steps.iter().filter(|step| !matches!(step, Step::Restore(_))) {
                world.take(step);
            }
            world.settle();
            prop_assert_eq!(world.fresh, 0);
        }
    }

    fn exchange(from: &mut End, to: &mut End) {
        while let Some(outgoing) = from.link.next_outgoing() {
            to.heard.extend(to.link.receive(outgoing).unwrap());
        }
    }

    #[test]
    fn a_copy_that_came_back_and_said_other_things_is_found_out() {
        let (mut hub, mut shim) = (End::new(7), End::new(7));
        shim.say("a".into());
        let snapshot = shim.clone();
        shim.say("b".into());
        exchange(&mut shim, &mut hub);
        // Never acknowledged, so the numbers alone would fit.
        let mut shim = snapshot;
        shim.say("c".into());
        assert!(!shim.link.accepts(&hub.link.position()));
        // The same words again are the same past.
        let mut same = End::new(7);
        same.say("a".into());
        same.say("b".into());
        assert!(same.link.accepts(&hub.link.position()));
        assert!(!Link::default().accepts(&Link::default().position()), "no link is no link to go on with");
    }

    #[test]
    fn a_peer_that_breaks_the_rules_is_refused() {
        let mut link = Link::new(1);
        let frame = |sequence, acknowledged| Outgoing { sequence, acknowledged, frame: "x".into() };
        assert_eq!(link.receive(frame(2, 0)), Err(Violation::Order { got: 2, expected: 1 }));
        assert_eq!(link.receive(frame(1, 1)), Err(Violation::Acknowledged { got: 1, last: 0 }));
        link.push("y".into());
        assert_eq!(
            link.receive(frame(1, 1)),
            Err(Violation::Acknowledged { got: 1, last: 0 }),
            "not written yet"
        );
        assert!(link.next_outgoing().is_some());
        assert_eq!(link.receive(frame(1, 1)).unwrap(), Some("x".into()));
        assert_eq!(link.receive(frame(1, 1)), Err(Violation::Order { got: 1, expected: 2 }));
    }
}
