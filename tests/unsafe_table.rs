//! docs/unsafe.md: every file that holds unsafe code, how much, and why it may. The numbers are counted here; reasons
//! are written by hand: COMPACTATTN_UPDATE_UNSAFE=1 cargo test --test unsafe_table renews the former and keeps the latter.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};

#[test]
fn the_table_is_what_the_code_holds() {
    let path = root().join("docs/unsafe.md");
    let text = std::fs::read_to_string(&path).unwrap();
    let (head, rows) = text.split_at(text.find("\n| `").map_or(text.len(), |at| at + 1));
    let reasons: BTreeMap<String, String> = rows.lines().filter_map(row).collect();
    let mut made = head.to_owned();
    for (file, [blocks, declared]) in counted() {
        let reason = reasons.get(&file).map_or("?", String::as_str);
        writeln!(made, "| `{file}` | {blocks} | {declared} | {reason} |").unwrap();
    }
    if std::env::var_os("COMPACTATTN_UPDATE_UNSAFE").is_some() {
        std::fs::write(&path, &made).unwrap();
        return;
    }
    assert!(!made.contains("| ? |"), "a file without a reason:\n{made}");
    assert!(text == made, "docs/unsafe.md is not what the code holds: COMPACTATTN_UPDATE_UNSAFE=1 renews it");
}

/// File and reason of a row.
fn row(line: &str) -> Option<(String, String)> {
    let cells: Vec<&str> = line.split('|').map(str::trim).collect();
    let file = cells.get(1)?.trim_matches('`');
    (cells.len() == 6).then(|| (file.to_owned(), cells[4].to_owned()))
}

/// Blocks with an unsafe operation; unsafe functions and implementations.
fn counted() -> BTreeMap<String, [usize; 2]> {
    let mut found = BTreeMap::new();
    let mut folders = vec![root().join("rust")];
    while let Some(folder) = folders.pop() {
        for path in std::fs::read_dir(folder).unwrap().flatten().map(|entry| entry.path()) {
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let text = std::fs::read_to_string(&path).unwrap();
            let count = |words: &[&str]| words.iter().map(|word| text.matches(word).count()).sum();
            let counts = [count(&["unsafe {"]), count(&["unsafe fn ", "unsafe extern ", "unsafe impl "])];
            if counts != [0, 0] {
                found.insert(path.strip_prefix(root()).unwrap().to_string_lossy().into_owned(), counts);
            }
        }
    }
    found
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_owned()
}
