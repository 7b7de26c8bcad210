// SPDX-License-Identifier: Apache-2.0
use proptest::prelude::*;
use substrate_proto::ateom::slot_status::Phase;

use super::*;

fn worker(id: &str, digest: &str, features: &[&str], phase: Phase) -> atelet::Worker {
    atelet::Worker {
        worker_id: id.into(),
        pool: String::new(),
        capabilities: Some(ateom::GetCapabilitiesResponse {
            sandbox_class: "gvisor".into(),
            runtime_digest: digest.into(),
            architecture: "amd64".into(),
            cpu_features: features.iter().map(ToString::to_string).collect(),
            ..Default::default()
        }),
        slot: Some(ateom::SlotStatus { phase: phase as i32, ..Default::default() }),
        alive: true,
        restores_only: false,
    }
}

#[test]
fn a_worker_of_an_older_runtime_takes_what_was_made_with_it_and_nothing_else() {
    let (one, _) = nodes();
    let mut pool = Pool::default();
    let older = atelet::Worker { restores_only: true, ..worker("a", "old", &[], Phase::Empty) };
    pool.report(&one, &older);
    let made_with = |digest: &str| Compatibility {
        sandbox_class: "gvisor".into(),
        runtime_digest: digest.into(),
        ..Compatibility::default()
    };
    let (old, new) = (made_with("old"), made_with("new"));
    assert!(matches!(pool.pick(&need(None, None, &[])), Err(NoWorker::None(_))), "it is not for new actors");
    let refused = pool.pick(&need(Some(&new), None, &[])).unwrap_err().to_string();
    assert!(refused.contains("reset"), "{refused}");
    assert_eq!(pool.pick(&need(Some(&old), None, &[])).unwrap().0.as_str(), "a");
    pool.report(&one, &worker("b", "new", &[], Phase::Empty));
    assert_eq!(pool.pick(&need(None, None, &[])).unwrap().0.as_str(), "b");
}

fn need<'a>(
    snapshot: Option<&'a Compatibility>,
    only: Option<&'a NodeName>,
    prefer: &'a [NodeName],
) -> Need<'a> {
    Need { pool: "", class: "", snapshot, only, prefer }
}

fn assignment(uid: &str, generation: u64, worker: &str) -> Assignment {
    Assignment { actor_uid: uid.into(), generation, worker_id: worker.into(), ..Default::default() }
}

fn nodes() -> (NodeName, NodeName) {
    ("n1".into(), "n2".into())
}

#[test]
fn a_pick_prefers_the_node_that_has_it_and_obeys_the_only_one() {
    let (one, two) = nodes();
    let mut pool = Pool::default();
    pool.report(&one, &worker("a", "d", &[], Phase::Empty));
    pool.report(&two, &worker("b", "d", &[], Phase::Empty));
    let preferred = [two.clone()];
    assert_eq!(pool.pick(&need(None, None, &[])).unwrap().1, one);
    assert_eq!(pool.pick(&need(None, None, &preferred)).unwrap().1, two);
    pool.assign(&two, &assignment("u", 1, "b"));
    assert_eq!(pool.pick(&need(None, None, &preferred)).unwrap().1, one);
    let full = pool.pick(&need(None, Some(&two), &[]));
    assert!(matches!(full, Err(NoWorker::Full { workers: 1, .. })), "{full:?}");
}

#[test]
fn a_worker_that_is_prepared_comes_before_one_that_is_not_but_after_the_node_that_has_it() {
    let (one, two) = nodes();
    let mut pool = Pool::default();
    let prepared = |id: &str| {
        let mut report = worker(id, "d", &[], Phase::Empty);
        report.slot.as_mut().unwrap().prepared = true;
        report
    };
    pool.report(&one, &worker("a", "d", &[], Phase::Empty));
    pool.report(&two, &prepared("b"));
    pool.report(&two, &prepared("c"));
    let pick = |pool: &Pool, prefer: &[NodeName]| pool.pick(&need(None, None, prefer)).unwrap().0;
    assert_eq!(pick(&pool, &[]).as_str(), "b");
    assert_eq!(pick(&pool, std::slice::from_ref(&one)).as_str(), "a");
    // Freed, it prepares its next sandbox first.
    pool.assign(&two, &assignment("u", 1, "b"));
    pool.free(&"b".into(), &"u".into(), Generation(1), true);
    assert_eq!(pick(&pool, std::slice::from_ref(&two)).as_str(), "c");
    pool.report(&one, &prepared("a"));
    assert_eq!(pick(&pool, &[]).as_str(), "a");
}

#[test]
fn a_snapshot_goes_only_where_it_can_be_restored() {
    let (one, two) = nodes();
    let mut pool = Pool::default();
    pool.report(&one, &worker("a", "old", &["avx", "avx2"], Phase::Empty));
    pool.report(&two, &worker("b", "new", &["avx"], Phase::Empty));
    let needs = |digest: &str, features: &[&str]| Compatibility {
        sandbox_class: "gvisor".into(),
        runtime_digest: digest.into(),
        architecture: "amd64".into(),
        cpu_features: features.iter().map(ToString::to_string).collect(),
        ..Default::default()
    };
    assert_eq!(pool.pick(&need(Some(&needs("new", &[])), None, &[])).unwrap().1, two);
    assert_eq!(pool.pick(&need(Some(&needs("old", &["avx2"])), None, &[])).unwrap().1, one);
    for wrong in [needs("new", &["avx2"]), needs("other", &[])] {
        let none = pool.pick(&need(Some(&wrong), None, &[])).unwrap_err();
        assert!(matches!(&none, NoWorker::None(m) if m.contains(&wrong.runtime_digest)), "{none}");
    }
    let mut report = worker("b", "new", &["avx"], Phase::Empty);
    report.capabilities.as_mut().unwrap().facts.insert("platform".into(), "systrap".into());
    pool.report(&two, &report);
    let mut fact = needs("new", &[]);
    fact.facts.insert("of.snapshot".into(), "1".into());
    fact.facts.insert("platform".into(), "systrap".into());
    pool.pick(&need(Some(&fact), None, &[])).unwrap();
    fact.facts.insert("platform".into(), "kvm".into());
    assert!(pool.pick(&need(Some(&fact), None, &[])).is_err());
}

#[test]
fn cordoned_dead_silent_and_busy_workers_are_never_picked() {
    let (one, _) = nodes();
    let mut pool = Pool::default();
    let pick = |pool: &Pool| pool.pick(&need(None, None, &[]));
    assert!(matches!(pick(&pool), Err(NoWorker::None(m)) if m.contains("no live worker")));
    pool.report(&one, &worker("a", "d", &[], Phase::Empty));
    pick(&pool).unwrap();
    pool.cordon(&"a".into(), true);
    assert!(matches!(pick(&pool), Err(NoWorker::None(m)) if m.contains("cordoned")));
    // A report does not undo it.
    pool.report(&one, &worker("a", "d", &[], Phase::Empty));
    assert!(pick(&pool).is_err());
    pool.cordon(&"a".into(), false);
    pick(&pool).unwrap();
    pool.report(&one, &worker("a", "d", &[], Phase::Terminating));
    assert!(matches!(pick(&pool), Err(NoWorker::Full { being_freed: true, .. })));
    pool.report(&one, &worker("a", "d", &[], Phase::Empty));
    pool.silence(&one);
    assert!(pick(&pool).is_err());
    assert_eq!(pool.prune(&one).len(), 1);
}

#[test]
fn what_is_assigned_is_named_by_a_lease_even_before_its_worker_reports() {
    let (one, two) = nodes();
    let mut pool = Pool::default();
    pool.assign(&one, &assignment("u", 3, "a"));
    assert_eq!(pool.assignments(&one).len(), 1);
    assert!(pool.assignments(&two).is_empty());
    pool.report(&one, &worker("a", "d", &[], Phase::Running));
    assert_eq!(pool.assignments(&one)[0].generation, 3);
    // A late end of an earlier generation does not free it.
    assert!(!pool.free(&"a".into(), &"u".into(), Generation(2), true));
    assert!(!pool.free(&"a".into(), &"v".into(), Generation(3), true));
    assert!(pool.pick(&need(None, None, &[])).is_err());
    assert!(pool.free(&"a".into(), &"u".into(), Generation(3), true));
    pool.pick(&need(None, None, &[])).unwrap();
}

#[test]
fn a_pick_among_ten_thousand_is_fast() {
    let (one, two) = nodes();
    let mut pool = Pool::default();
    for i in 0..10_000 {
        let node = if i % 2 == 0 { &one } else { &two };
        pool.report(node, &worker(&format!("w{i:05}"), "d", &[], Phase::Empty));
    }
    let preferred = [two];
    let began = std::time::Instant::now();
    for i in 0..5_000 {
        let (id, node) = pool.pick(&need(None, None, &preferred)).unwrap();
        pool.assign(&node, &assignment(&format!("u{i}"), 1, id.as_str()));
    }
    assert!(began.elapsed().as_millis() < 5_000, "{:?} for 5000 picks", began.elapsed());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]
    #[test]
    fn the_index_always_agrees_with_the_workers(
        steps in proptest::collection::vec((0usize..6, 0usize..5, 0u64..3), 1..60)
    ) {
        let (one, two) = nodes();
        let mut pool = Pool::default();
        for (what, which, generation) in steps {
            let id = format!("w{which}");
            let node = if which % 2 == 0 { &one } else { &two };
            match what {
                0 => { pool.report(node, &worker(&id, "d", &[], Phase::Empty)); }
                1 => { pool.report(node, &worker(&id, "e", &[], Phase::Running)); }
                2 => pool.assign(node, &assignment("u", generation, &id)),
                3 => { pool.free(&id.as_str().into(), &"u".into(), Generation(generation), true); }
                4 => { pool.cordon(&id.as_str().into(), generation == 0); }
                _ => pool.lost(&id.as_str().into()),
            }
            let free: BTreeSet<_> =
                pool.workers.values().filter(|w| w.is_free()).map(|w| w.record.id.clone()).collect();
            let listed: Vec<_> =
                pool.free.values().flatten().map(|(_, _, id)| id.clone()).collect();
            prop_assert_eq!(listed.len(), free.len());
            prop_assert!(listed.iter().all(|id| free.contains(id)));
            match pool.pick(&need(None, None, &[])) {
                Ok((id, _)) => prop_assert!(free.contains(&id)),
                Err(_) => prop_assert!(free.is_empty()),
            }
        }
    }
}
