//! The fault language: what a faulty disk does, as text.
//!
//! ```text
//! rules   = rule *( (";" | newline) rule )          "#" starts a comment
//! rule    = "lose-unflushed" [ "seed=" n ]           unflushed writes stay in memory; some sectors land early
//!         | "error"   conditions                     the operation fails
//!         | "corrupt" conditions                     bytes read or written are flipped, one bit in each
//!         | "slow"    "ms=" n conditions             the operation takes n ms longer
//!         | "hang"    conditions                     the operation never returns
//! conditions, each optional:
//!   on=read|write|flush     this operation only      (corrupt: read or write, read where not said)
//!   range=a..b              operations that touch bytes [a, b); corrupt: those bytes only
//!   after=n                 not the first n that match
//!   times=n                 only n of those that match
//! ```
//! Numbers are decimal or 0x-hexadecimal.

use std::ops::Range;
use std::str::FromStr;
use std::time::Duration;

/// More rules than this are refused.
const RULES_MAX: usize = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    Read,
    Write,
    Flush,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    LoseUnflushed { seed: u64 },
    Error,
    Corrupt,
    Slow { delay: Duration },
    Hang,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Rule {
    pub action: Action,
    on: Option<Operation>,
    pub range: Option<Range<u64>>,
    after: u64,
    times: u64,
    /// Operations that matched so far.
    matched: u64,
}

/// Parsed rules; see the module for the language.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    pub(super) rules: Vec<Rule>,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("fault rule {rule:?}: {reason}")]
pub struct ParseFaultsError {
    pub rule: String,
    pub reason: String,
}

impl FromStr for Faults {
    type Err = ParseFaultsError;

    fn from_str(text: &str) -> Result<Faults, ParseFaultsError> {
        let lines = text.lines().map(|line| line.split('#').next().unwrap_or_default());
        let texts = lines.flat_map(|line| line.split(';')).map(str::trim).filter(|rule| !rule.is_empty());
        let rules = texts
            .map(|text| Rule::parse(text).map_err(|reason| ParseFaultsError { rule: text.to_owned(), reason }))
            .collect::<Result<Vec<Rule>, _>>()?;
        if rules.len() > RULES_MAX {
            let reason = format!("more than {RULES_MAX} rules");
            return Err(ParseFaultsError { rule: String::new(), reason });
        }
        Ok(Faults { rules })
    }
}

impl Rule {
    fn parse(text: &str) -> Result<Rule, String> {
        let mut words = text.split_whitespace();
        let name = words.next().unwrap_or_default();
        let mut rule = Rule { action: Action::Error, on: None, range: None, after: 0, times: u64::MAX, matched: 0 };
        let (mut seed, mut delay) = (None, None);
        for word in words {
            let (key, value) = word.split_once('=').ok_or_else(|| format!("{word:?} is not key=value"))?;
            match key {
                "on" => rule.on = Some(operation(value)?),
                "range" => rule.range = Some(range(value)?),
                "after" => rule.after = number(value)?,
                "times" => rule.times = number(value)?,
                "seed" if name == "lose-unflushed" => seed = Some(number(value)?),
                "ms" if name == "slow" => delay = Some(Duration::from_millis(number(value)?)),
                _ => return Err(format!("unknown key {key:?}")),
            }
        }
        rule.action = match name {
            "lose-unflushed" => Action::LoseUnflushed { seed: seed.unwrap_or(0) },
            "error" => Action::Error,
            "corrupt" => Action::Corrupt,
            "slow" => Action::Slow { delay: delay.ok_or("ms= is missing")? },
            "hang" => Action::Hang,
            _ => return Err(format!("unknown fault {name:?}")),
        };
        let conditional = rule.on.is_some() || rule.range.is_some() || rule.after != 0 || rule.times != u64::MAX;
        match rule.action {
            Action::LoseUnflushed { .. } if conditional => Err("lose-unflushed has no conditions".to_owned()),
            Action::Corrupt if rule.on == Some(Operation::Flush) => Err("a flush has no bytes to corrupt".to_owned()),
            Action::Corrupt if rule.on.is_none() => Ok(Rule { on: Some(Operation::Read), ..rule }),
            _ => Ok(rule),
        }
    }

    #[cfg(test)]
    pub fn has_matched(&self) -> bool {
        self.matched > 0
    }

    /// Whether the rule acts on this operation; counts it. `touched` is empty for a flush, which has no range.
    pub fn acts(&mut self, operation: Operation, touched: &Range<u64>) -> bool {
        let operation_matches = self.on.is_none_or(|on| on == operation);
        let range_matches = match &self.range {
            Some(range) => range.start < touched.end && touched.start < range.end,
            None => true,
        };
        if !operation_matches || !range_matches {
            return false;
        }
        let number = self.matched;
        self.matched += 1;
        number >= self.after && number - self.after < self.times
    }
}

fn operation(text: &str) -> Result<Operation, String> {
    match text {
        "read" => Ok(Operation::Read),
        "write" => Ok(Operation::Write),
        "flush" => Ok(Operation::Flush),
        _ => Err(format!("{text:?} is not read, write or flush")),
    }
}

fn range(text: &str) -> Result<Range<u64>, String> {
    let (start, end) = text.split_once("..").ok_or_else(|| format!("{text:?} is not a..b"))?;
    let range = number(start)?..number(end)?;
    if range.is_empty() { Err(format!("{text:?} is empty")) } else { Ok(range) }
}

fn number(text: &str) -> Result<u64, String> {
    let parsed = match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => text.parse(),
    };
    parsed.map_err(|_| format!("{text:?} is not a number"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_read_and_nonsense_has_its_reason() {
        let faults: Faults =
            "lose-unflushed seed=7; slow ms=5 on=flush\n error on=read range=0x10..32 # bad".parse().unwrap();
        assert_eq!(faults.rules.len(), 3);
        assert_eq!(faults.rules[2].range, Some(16..32));
        for (text, reason) in [
            ("explode", "unknown fault"),
            ("error on=trim", "is not read, write or flush"),
            ("error range=9..9", "is empty"),
            ("error after=-1", "is not a number"),
            ("slow", "ms= is missing"),
            ("lose-unflushed times=1", "no conditions"),
            ("corrupt on=flush", "no bytes"),
            ("error ms=3", "unknown key"),
        ] {
            let error = text.parse::<Faults>().unwrap_err();
            assert!(error.reason.contains(reason), "{text}: {error}");
        }
    }

    #[test]
    fn after_and_times_count_only_what_matches() {
        let mut rule = Rule::parse("error on=write range=10..20 after=1 times=2").unwrap();
        let mut acts = |operation, start| rule.acts(operation, &(start..start + 5));
        assert!(!acts(Operation::Write, 10));
        assert!(!acts(Operation::Read, 10));
        assert!(!acts(Operation::Write, 20));
        assert!(acts(Operation::Write, 19));
        assert!(acts(Operation::Write, 6));
        assert!(!acts(Operation::Write, 10));
    }
}
