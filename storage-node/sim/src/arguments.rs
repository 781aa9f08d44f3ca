//! The command line of `holdfast-sim`.

use std::ops::Range;

pub const USAGE: &str = "usage: holdfast-sim [--seeds N] [--seed S] [--complete] [--replay] [--planted BUG]

  --seeds N      run so many seeds, 1 unless told otherwise
  --seed S       the first of them, 1 unless told otherwise
  --complete     fail unless every kind of fault and every mark has occurred, and nine seeds of ten count
  --replay       tell what happens as it happens
  --planted BUG  plant the bug; succeeds if a seed finds it";

#[derive(Debug, PartialEq, Eq)]
pub struct Arguments {
    pub count: u64,
    pub first: u64,
    pub complete: bool,
    pub replay: bool,
    pub planted: Option<String>,
}

impl Arguments {
    /// # Errors
    /// What is not understood, in words.
    pub fn parse(mut words: impl Iterator<Item = String>) -> Result<Arguments, String> {
        let mut arguments = Arguments { count: 1, first: 1, complete: false, replay: false, planted: None };
        while let Some(word) = words.next() {
            let mut value = || words.next().ok_or_else(|| format!("{word} needs a value"));
            let number = |text: String| text.parse::<u64>().map_err(|_| format!("{text:?} is not a number"));
            match word.as_str() {
                "--seeds" => arguments.count = number(value()?)?,
                "--seed" => arguments.first = number(value()?)?,
                "--complete" => arguments.complete = true,
                "--replay" => arguments.replay = true,
                "--planted" => arguments.planted = Some(value()?),
                _ => return Err(format!("{word:?} is not known")),
            }
        }
        Ok(arguments)
    }

    pub fn seeds(&self) -> Range<u64> {
        self.first..self.first.saturating_add(self.count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_understood_and_what_is_not() {
        let parse = |text: &str| Arguments::parse(text.split_whitespace().map(str::to_owned));
        let given = parse("--seeds 10 --seed 7 --complete --replay --planted x").unwrap();
        let planted = Some("x".into());
        assert_eq!(given, Arguments { count: 10, first: 7, complete: true, replay: true, planted });
        assert_eq!(given.seeds(), 7..17);
        assert!(parse("--seeds").is_err() && parse("--seed x").is_err() && parse("--else").is_err());
    }
}
