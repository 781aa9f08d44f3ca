//! Which storage node has been gone for so long that what it holds is made again elsewhere. Pure.
//!
//! One at a time, the longest gone first, and only as long as fewer than half of the nodes are away: where many are gone
//! at once, a network or a power supply is, and copying what comes back with it would only be in its way. Time counts
//! while somebody looks, so that a start of the whole machine room finds nobody late.

use std::collections::BTreeMap;
use std::time::Duration;

use holdfast_api::v1;
use k8s_openapi::jiff::Timestamp;

use super::observed::Catalogue;

/// What to do about nodes that are gone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Counts as away from now on.
    pub away: Option<String>,
    /// Why nobody else does.
    pub held: Option<String>,
}

/// `gone_since`: nodes that are not connected, by name, and since when. `looking_since`: when somebody began to look, and
/// the metadata plane to answer.
pub fn judge(
    catalogue: &Catalogue,
    gone_since: &BTreeMap<String, Timestamp>,
    looking_since: Timestamp,
    timeout: Duration,
    now: Timestamp,
) -> Verdict {
    let members = catalogue.nodes.iter().filter(|node| node.state() != v1::NodeState::Removed).count();
    let away = catalogue.nodes.iter().filter(|node| node.state() == v1::NodeState::Away).count();
    let late = |node: &&v1::ClusterNode| {
        let since = gone_since.get(&node.name)?.max(&looking_since);
        let gone = now.duration_since(*since);
        let is_late = node.state() == v1::NodeState::Active && !node.connected;
        (is_late && Duration::try_from(gone).is_ok_and(|gone| gone >= timeout)).then_some(*since)
    };
    let mut late: Vec<_> = catalogue.nodes.iter().filter_map(|node| Some((late(&node)?, node.name.clone()))).collect();
    late.sort();
    let Some((_, name)) = late.into_iter().next() else { return Verdict::default() };
    if (away + 1) * 2 < members {
        return Verdict { away: Some(name), held: None };
    }
    let held = format!(
        "{name} has been gone for longer than nodeLossTimeout; with it {} of {members} storage nodes would be away, so \
         nothing is made again elsewhere: start them, or mend their network",
        away + 1
    );
    Verdict { away: None, held: Some(held) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(600);

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    /// Nodes a, b, c...: `A` connected, `G` gone, `W` away, `D` draining and gone.
    fn judged(nodes: &str, since: &[(&str, i64)], looking: i64, now: i64) -> Verdict {
        let node = |(i, kind): (usize, char)| v1::ClusterNode {
            name: char::from(b'a' + u8::try_from(i).unwrap()).to_string(),
            connected: kind == 'A',
            state: match kind {
                'W' => v1::NodeState::Away,
                'D' => v1::NodeState::Draining,
                _ => v1::NodeState::Active,
            }
            .into(),
            ..v1::ClusterNode::default()
        };
        let catalogue = Catalogue { nodes: nodes.chars().enumerate().map(node).collect(), volumes: Vec::new() };
        let since = since.iter().map(|(name, since)| ((*name).to_owned(), at(*since))).collect();
        judge(&catalogue, &since, at(looking), TIMEOUT, at(now))
    }

    fn away(name: &str) -> Verdict {
        Verdict { away: Some(name.into()), held: None }
    }

    #[test]
    fn a_node_is_away_when_its_time_is_over_and_no_sooner() {
        assert_eq!(judged("AGA", &[("b", 100)], 0, 699), Verdict::default());
        assert_eq!(judged("AGA", &[("b", 100)], 0, 700), away("b"));
        assert_eq!(judged("AAA", &[("b", 100)], 0, 5000), Verdict::default(), "it is back");
        assert_eq!(judged("AGA", &[], 0, 5000), Verdict::default(), "nobody knows since when");
        assert_eq!(judged("ADA", &[("b", 100)], 0, 5000), Verdict::default(), "a person drains it");
    }

    #[test]
    fn time_counts_while_somebody_looks() {
        assert_eq!(judged("AGA", &[("b", 100)], 4000, 4599), Verdict::default());
        assert_eq!(judged("AGA", &[("b", 100)], 4000, 4600), away("b"));
    }

    #[test]
    fn the_longest_gone_comes_first_and_half_of_them_never_go() {
        assert_eq!(judged("AGGAA", &[("b", 200), ("c", 100)], 0, 5000), away("c"));
        assert_eq!(judged("AGWAA", &[("b", 200), ("c", 100)], 0, 5000), away("b"));
        let held = judged("AGWA", &[("b", 200), ("c", 100)], 0, 5000);
        assert_eq!(held.away, None);
        assert!(held.held.unwrap().contains("2 of 4 storage nodes"));
        assert_eq!(judged("GA", &[("a", 0)], 0, 5000).away, None);
    }
}
