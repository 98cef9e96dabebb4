//! The C ABI against its last record, tests/abi/<version>.txt: functions, struct sizes, offsets of fields, enum values.
//!
//! Within a version nothing recorded may go or change; structs may grow at their ends, names may be added. Another
//! version starts a record of its own: COMPACTATTN_UPDATE_ABI=1 cargo test --test abi writes it.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

#[test]
fn nothing_that_was_published_has_changed() {
    let now = describe(&header());
    let path = root().join(format!("tests/abi/{}.txt", env!("CARGO_PKG_VERSION")));
    if std::env::var_os("COMPACTATTN_UPDATE_ABI").is_some() {
        let lines: String = now.iter().fold(String::new(), |mut all, (name, value)| {
            writeln!(all, "{}", format!("{name} {value}").trim_end()).unwrap();
            all
        });
        std::fs::write(&path, lines).unwrap();
    }
    let recorded = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let broken = broken(&recorded, &now);
    assert!(broken.is_empty(), "the ABI has changed within a version:\n{}", broken.join("\n"));
    assert!(recorded.lines().count() > 250, "the record is too short to be one");
}

#[test]
fn a_change_is_noticed() {
    let was = "function f\nsizeof s 8\noffsetof s.a 4\nenum A 1\n";
    let of = |text: &str| parse(text);
    assert!(broken(was, &of(was)).is_empty());
    assert!(broken(was, &of(&was.replace("sizeof s 8", "sizeof s 16"))).is_empty());
    for changed in [
        was.replace("function f\n", ""),
        was.replace("sizeof s 8", "sizeof s 4"),
        was.replace("s.a 4", "s.a 8"),
        was.replace("A 1", "A 2"),
    ] {
        assert_eq!(broken(was, &of(&changed)).len(), 1, "{changed}");
    }
}

/// What was recorded and is no longer so.
fn broken(recorded: &str, now: &BTreeMap<String, String>) -> Vec<String> {
    let holds = |name: &str, was: &str, is: &str| {
        let larger = || was.parse::<u64>().is_ok_and(|was| is.parse::<u64>().is_ok_and(|is| is >= was));
        was == is || (name.starts_with("sizeof") && larger())
    };
    let verdict = |(name, was): (String, String)| match now.get(&name) {
        Some(is) if holds(&name, &was, is) => None,
        is => Some(format!("{name}: {was:?}, now {is:?}")),
    };
    parse(recorded).into_iter().filter_map(verdict).collect()
}

/// "kind name value" lines; a function has no value.
fn parse(text: &str) -> BTreeMap<String, String> {
    text.lines()
        .map(|line| match line.trim_end().splitn(3, ' ').collect::<Vec<_>>()[..] {
            [kind, name, value] => (format!("{kind} {name}"), value.to_owned()),
            _ => (line.trim_end().to_owned(), String::new()),
        })
        .collect()
}

/// What a C compiler makes of the header.
fn describe(header: &str) -> BTreeMap<String, String> {
    let mut lines = Vec::new();
    for (name, fields) in structs(header) {
        lines.push(format!(r#"  printf("sizeof {name} %zu\n", sizeof({name}));"#));
        for field in fields {
            lines.push(format!(r#"  printf("offsetof {name}.{field} %zu\n", offsetof({name}, {field}));"#));
        }
    }
    for name in enumerators(header) {
        lines.push(format!(r#"  printf("enum {name} %d\n", (int){name});"#));
    }
    let program = format!(
        "#include <stdio.h>\n#include \"compactattn.h\"\nint main(void) {{\n{}\n  return 0;\n}}\n",
        lines.join("\n")
    );
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let (source, binary) = (folder.join("abi.c"), folder.join("abi"));
    std::fs::write(&source, program).unwrap();
    let include = format!("-I{}", root().join("include").display());
    let status =
        Command::new("cc").args([&include, "-std=c99", "-o"]).args([&binary, &source]).status().unwrap();
    assert!(status.success());
    let out = String::from_utf8(Command::new(&binary).output().unwrap().stdout).unwrap();
    let mut all = parse(&out);
    all.extend(functions(header).map(|name| (format!("function {name}"), String::new())));
    all
}

/// Names and fields of `typedef struct X { ... } X;`.
fn structs(header: &str) -> Vec<(String, Vec<String>)> {
    let bodies = header.split("typedef struct ").skip(1).filter_map(|rest| {
        let (name, rest) = rest.split_once([' ', ';'])?;
        let body = rest.strip_prefix("{")?.split_once('}')?.0;
        let field = |line: &str| {
            let line = line.trim();
            let name = line.strip_suffix(';')?.rsplit([' ', '*']).next()?;
            (!line.starts_with("//")).then(|| name.split('[').next().unwrap_or(name).to_owned())
        };
        Some((name.to_owned(), body.lines().filter_map(field).collect()))
    });
    bodies.collect()
}

/// `  COMPACTATTN_X = 1,` within enums.
fn enumerators(header: &str) -> impl Iterator<Item = &str> {
    header.lines().filter_map(|line| {
        let (name, value) = line.strip_prefix("  COMPACTATTN_")?.split_once(" = ")?;
        value.ends_with(',').then(|| &line[2..2 + "COMPACTATTN_".len() + name.len()])
    })
}

fn functions(header: &str) -> impl Iterator<Item = &str> {
    let declared = header.split("extern \"C\" {").nth(1).unwrap_or_default();
    declared.lines().filter(|line| !line.starts_with([' ', '/'])).filter_map(|line| {
        let before = line.split('(').next()?;
        before.rsplit([' ', '*']).next().filter(|name| name.starts_with("compactattn_") && line.contains('('))
    })
}

fn header() -> String {
    std::fs::read_to_string(root().join("include/compactattn.h")).unwrap()
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}
