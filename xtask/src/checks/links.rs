//! Relative links of the Markdown pages lead somewhere: to a file or folder of the tree and, where they have a
//! fragment, to a heading of that page. Links to other sites are not followed.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::workspace::Workspace;

pub fn check(workspace: &Workspace) -> Result<Vec<String>> {
    let mut pages = Vec::new();
    collect_pages(workspace, &workspace.root, &mut pages)?;
    pages.sort();
    let mut violations = Vec::new();
    for page in &pages {
        let text = fs::read_to_string(page).with_context(|| page.display().to_string())?;
        let shown = page.strip_prefix(&workspace.root).unwrap_or(page).display();
        for (line, target) in links(&text) {
            if let Some(reason) = obstacle(page, target) {
                violations.push(format!("{shown}:{line}: link {target}: {reason}"));
            }
        }
    }
    Ok(violations)
}

/// Every `.md` below `directory`, without hidden folders other than `.github` and without cargo's target directory.
fn collect_pages(workspace: &Workspace, directory: &Path, pages: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(directory).with_context(|| directory.display().to_string())? {
        let entry = entry?;
        let path = entry.path();
        let name = entry.file_name();
        let hidden = name.to_string_lossy().starts_with('.') && name != ".github";
        if entry.file_type()?.is_dir() {
            if !hidden && name != "target" && path != workspace.target {
                collect_pages(workspace, &path, pages)?;
            }
        } else if path.extension().is_some_and(|extension| extension == "md") {
            pages.push(path);
        }
    }
    Ok(())
}

/// Targets of inline links `[text](target)` with their line, counted from 1; code blocks and code spans hold none.
fn links(text: &str) -> Vec<(usize, &str)> {
    let mut found = Vec::new();
    let mut in_code = false;
    for (number, line) in text.lines().enumerate() {
        if line.trim_start().starts_with("```") {
            in_code = !in_code;
        }
        if in_code {
            continue;
        }
        for outside in line.split('`').step_by(2) {
            found.extend(outside.split("](").skip(1).filter_map(|rest| Some((number + 1, rest.split_once(')')?.0))));
        }
    }
    found
}

/// Why a link on `page` leads nowhere; `None` if it does lead somewhere or is not ours to check.
fn obstacle(page: &Path, target: &str) -> Option<String> {
    if target.contains("://") || target.starts_with("mailto:") {
        return None;
    }
    let (file, fragment) = target.split_once('#').unwrap_or((target, ""));
    let path = if file.is_empty() { page.to_owned() } else { page.parent()?.join(file) };
    if !path.exists() {
        return Some("no such file".to_owned());
    }
    if fragment.is_empty() || path.extension().is_none_or(|extension| extension != "md") {
        return None;
    }
    match fs::read_to_string(&path) {
        Ok(text) if anchors(&text).any(|anchor| anchor == fragment) => None,
        Ok(_) => Some("no such heading".to_owned()),
        Err(error) => Some(error.to_string()),
    }
}

/// The fragments by which headings are reached: lower case, blanks as hyphens, other punctuation dropped.
fn anchors(text: &str) -> impl Iterator<Item = String> {
    text.lines().filter(|line| line.starts_with('#')).map(|line| {
        let heading = line.trim_start_matches('#').trim().to_lowercase();
        heading
            .chars()
            .filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'))
            .map(|c| if c == ' ' { '-' } else { c })
            .collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_found_outside_code() {
        let text = "see [a](a.md) and [b](b/c.md#d)\n```\n[no](x.md)\n```\n`[no](y.md)` but [z](../z)\n";
        assert_eq!(links(text), [(1, "a.md"), (1, "b/c.md#d"), (5, "../z")]);
    }

    #[test]
    fn headings_become_anchors() {
        let found: Vec<String> = anchors("# The parts\ntext\n## 3.1 Who knows whom?\n").collect();
        assert_eq!(found, ["the-parts", "31-who-knows-whom"]);
    }

    #[test]
    fn a_link_must_lead_to_a_file_and_a_heading() {
        let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
        let page = manifest.join("page.md");
        assert_eq!(obstacle(&page, "https://example.org/x"), None);
        assert_eq!(obstacle(&page, "src/main.rs"), None);
        assert_eq!(obstacle(&page, "src"), None);
        assert_eq!(obstacle(&page, "src/absent.rs"), Some("no such file".to_owned()));
    }
}
