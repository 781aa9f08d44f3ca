//! Whether storage nodes may go from the version they run to that of an image. Pure.
//!
//! Neighbouring minor versions understand each other's protocols and formats, so a cluster goes through each of them. An
//! image whose tag is no version is a matter of whoever built it.

use std::collections::BTreeMap;
use std::fmt;

/// Major and minor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Version(u64, u64);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0, self.1)
    }
}

impl Version {
    fn parse(text: &str) -> Option<Version> {
        let mut numbers = text.strip_prefix('v').unwrap_or(text).splitn(3, '.');
        let version = Version(numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?);
        // `1.2` may be anything; a version has three numbers.
        numbers.next().filter(|patch| patch.starts_with(|first: char| first.is_ascii_digit())).map(|_| version)
    }

    fn of_image(image: &str) -> Option<Version> {
        let image = image.split('@').next()?;
        let (_, tag) = image.rsplit_once(':').filter(|(_, tag)| !tag.contains('/'))?;
        Version::parse(tag)
    }

    fn reaches(self, other: Version) -> bool {
        self.0 == other.0 && self.1.abs_diff(other.1) <= 1
    }
}

/// Why the members, whose builds these are by name, may not be replaced by the image.
pub fn obstacle(running: &BTreeMap<String, String>, image: &str) -> Option<String> {
    let target = Version::of_image(image)?;
    let of = |(name, build): (&String, &String)| Some((Version::parse(build)?, name.clone()));
    let (from, name) = running.iter().filter_map(of).find(|(from, _)| !from.reaches(target))?;
    let next = if target > from { Version(from.0, from.1 + 1) } else { Version(from.0, from.1.saturating_sub(1)) };
    let by_way = if from.0 == target.0 { format!(": go by way of {next}") } else { String::new() };
    Some(format!(
        "{name} runs {from} and the image {image} is {target}: versions go one minor at a time{by_way}; nothing is \
         changed meanwhile"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(builds: &[&str], image: &str) -> Option<String> {
        let name = |(i, build): (usize, &&str)| (format!("main-main-{i}"), (*build).to_owned());
        obstacle(&builds.iter().enumerate().map(name).collect(), image)
    }

    #[test]
    fn versions_go_one_minor_at_a_time() {
        for image in ["holdfast:0.2.9", "r:5000/holdfast:v0.3.0", "holdfast:0.1.0-rc1@sha256:00"] {
            assert_eq!(said(&["0.2.0", "0.2.1"], image), None, "{image}");
        }
        let message = said(&["0.2.0", "0.1.0"], "holdfast:0.3.0").unwrap();
        assert!(message.contains("main-main-1 runs 0.1 ") && message.contains("by way of 0.2"), "{message}");
        let message = said(&["0.3.0"], "holdfast:0.1.0").unwrap();
        assert!(message.contains("by way of 0.2"), "{message}");
        assert!(said(&["0.9.0"], "holdfast:1.0.0").is_some());
    }

    #[test]
    fn what_is_no_version_is_not_judged() {
        for image in
            ["holdfast", "r:5000/holdfast", "holdfast:latest", "holdfast:9f86d08", "holdfast:9.9", "h@sha256:0"]
        {
            assert_eq!(said(&["0.1.0"], image), None, "{image}");
        }
        assert_eq!(said(&["unknown"], "holdfast:9.0.0"), None);
        assert_eq!(said(&[], "holdfast:9.0.0"), None, "nothing runs yet");
    }
}
