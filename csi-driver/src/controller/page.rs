//! Pages of a list that is ordered by name. Pure.

/// Before the name of the last entry of the former page, in a token: tells ours from anything else.
const TOKEN: &str = "after:";

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PageError {
    #[error("max_entries is negative")]
    Negative,
    #[error("starting_token {0:?} is none of ours: begin again without one")]
    Token(String),
}

/// The entries of one page, and the token of the next where there is one.
pub fn of<T>(
    mut entries: Vec<T>,
    name: impl Fn(&T) -> String,
    max: i32,
    token: &str,
) -> Result<(Vec<T>, String), PageError> {
    let max = usize::try_from(max).map_err(|_| PageError::Negative)?;
    entries.sort_by_key(&name);
    if !token.is_empty() {
        let after = token.strip_prefix(TOKEN).ok_or_else(|| PageError::Token(token.chars().take(80).collect()))?;
        // What has gone since is no gap: the page begins behind its place.
        entries.retain(|entry| name(entry).as_str() > after);
    }
    if max == 0 || entries.len() <= max {
        return Ok((entries, String::new()));
    }
    entries.truncate(max);
    let next = entries.last().map(|last| format!("{TOKEN}{}", name(last))).unwrap_or_default();
    Ok((entries, next))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_follow_one_another_without_gap_or_repetition() {
        let all = || ["c", "a", "d", "b"].map(str::to_owned).to_vec();
        let (first, next) = of(all(), String::clone, 3, "").unwrap();
        assert_eq!((first.join(""), next.as_str()), ("abc".to_owned(), "after:c"));
        let (rest, end) = of(all(), String::clone, 3, &next).unwrap();
        assert_eq!((rest.join(""), end.as_str()), ("d".to_owned(), ""));
        assert_eq!(of(all(), String::clone, 0, "").unwrap().0.len(), 4);
        assert_eq!(of(all(), String::clone, -1, "").err(), Some(PageError::Negative));
        assert!(matches!(of(all(), String::clone, 0, "invalid-token"), Err(PageError::Token(_))));
    }
}
