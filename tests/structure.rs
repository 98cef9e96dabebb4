//! The rules of the house that a test can hold: sizes, where `unsafe` and the environment may stand, what the core
//! may not name. Limits are those of CONTRIBUTING.md.

use std::fs;
use std::path::{Path, PathBuf};

use syn::spanned::Spanned;
use syn::visit::{self, Visit};

const FILE_LINES: usize = 500;
const KERNEL_LINES: usize = 600;
const FUNCTION_LINES: usize = 80;
const PARAMETERS: usize = 6;
const NESTING: usize = 3;

/// Written by a tool, so not by these rules.
const GENERATED: [&str; 1] = ["include/compactattn.h"];

/// The only places that may hold `unsafe`.
const UNSAFE_HOMES: [&str; 3] = ["rust/capi/", "rust/cuda/", "rust/bridge.rs"];

#[test]
fn no_file_is_longer_than_its_limit() {
    let long: Vec<_> = sources()
        .into_iter()
        .map(|path| (lines(&path), path))
        .filter(|(lines, path)| *lines > if path.ends_with("kernel.cuh") { KERNEL_LINES } else { FILE_LINES })
        .collect();
    assert!(long.is_empty(), "too long: {long:?}");
}

#[test]
fn documents_keep_their_length() {
    for (name, most) in [("README.md", 200), ("ARCHITECTURE.md", 150), ("CONTRIBUTING.md", 100)] {
        let lines = lines(&root().join(name));
        assert!(lines <= most, "{name}: {lines} lines, at most {most}");
    }
}

#[test]
fn functions_are_short_flat_and_take_few_parameters() {
    let mut faults = Vec::new();
    for path in rust_sources() {
        let mut check = Functions { path: path.clone(), faults: Vec::new() };
        check.visit_file(&parse(&path));
        faults.append(&mut check.faults);
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn unsafe_stands_only_where_it_may() {
    let unsafe_word = ["unsafe", " {"].concat();
    for path in rust_sources().iter().filter(|path| path.starts_with(root().join("rust"))) {
        let name = relative(path);
        let allowed = UNSAFE_HOMES.iter().any(|home| name.starts_with(home));
        assert!(allowed || !read(path).contains(&unsafe_word), "{name} holds unsafe code");
    }
}

#[test]
fn the_environment_is_read_in_one_place() {
    for path in rust_sources().iter().filter(|path| path.starts_with(root().join("rust"))) {
        let name = relative(path);
        let reads = ["env::var", "env::vars"].iter().any(|call| read(path).contains(call));
        assert!(!reads || name == "rust/config.rs", "{name} reads the environment");
    }
}

#[test]
fn the_core_names_no_framework() {
    let words = ["torch", "numpy", "vllm"].map(str::to_owned);
    for path in sources() {
        let name = relative(&path);
        if name.starts_with("rust/") || name.starts_with("cuda/") || name.starts_with("include/") {
            let text = read(&path).to_lowercase();
            let named: Vec<_> = words.iter().filter(|word| text.contains(*word)).collect();
            assert!(named.is_empty(), "{name} names {named:?}");
        }
    }
}

#[test]
fn every_stage_word_has_its_file() {
    for stage in ["batch", "plan", "select", "union", "table", "attend", "combine"] {
        let file = root().join(format!("rust/{stage}.rs"));
        let folder = root().join(format!("rust/{stage}/mod.rs"));
        assert!(file.exists() || folder.exists(), "no home for stage {stage}");
    }
}

/// Lengths, parameters and nesting of each function of a file.
struct Functions {
    path: PathBuf,
    faults: Vec<String>,
}

impl Functions {
    fn check(&mut self, signature: &syn::Signature, block: &syn::Block) {
        let span = block.span();
        let lines = span.end().line - span.start().line + 1;
        let mut depth = Depth::default();
        depth.visit_block(block);
        for (what, got, most) in [
            ("lines", lines, FUNCTION_LINES),
            ("parameters", signature.inputs.len(), PARAMETERS),
            ("levels of nesting", depth.deepest, NESTING),
        ] {
            if got > most {
                let place = format!("{}:{}", relative(&self.path), span.start().line);
                self.faults.push(format!("{place} {}: {got} {what}, at most {most}", signature.ident));
            }
        }
    }
}

impl<'ast> Visit<'ast> for Functions {
    fn visit_item_fn(&mut self, item: &'ast syn::ItemFn) {
        self.check(&item.sig, &item.block);
        visit::visit_item_fn(self, item);
    }

    fn visit_impl_item_fn(&mut self, item: &'ast syn::ImplItemFn) {
        self.check(&item.sig, &item.block);
        visit::visit_impl_item_fn(self, item);
    }
}

/// How deep loops and branches stand within each other.
#[derive(Default)]
struct Depth {
    now: usize,
    deepest: usize,
}

impl Depth {
    fn deeper(&mut self, visit: impl FnOnce(&mut Self)) {
        self.now += 1;
        self.deepest = self.deepest.max(self.now);
        visit(self);
        self.now -= 1;
    }
}

impl<'ast> Visit<'ast> for Depth {
    fn visit_expr(&mut self, expr: &'ast syn::Expr) {
        use syn::Expr;
        match expr {
            // `else if` continues a chain; it does not nest.
            Expr::If(branch) => {
                self.visit_expr(&branch.cond);
                self.deeper(|depth| depth.visit_block(&branch.then_branch));
                match branch.else_branch.as_ref().map(|(_, other)| &**other) {
                    Some(Expr::Block(block)) => self.deeper(|depth| depth.visit_block(&block.block)),
                    Some(other) => self.visit_expr(other),
                    None => {}
                }
            }
            Expr::ForLoop(_) | Expr::While(_) | Expr::Loop(_) | Expr::Match(_) => {
                self.deeper(|depth| visit::visit_expr(depth, expr));
            }
            _ => visit::visit_expr(self, expr),
        }
    }

    // A function within a function starts anew.
    fn visit_item_fn(&mut self, _: &'ast syn::ItemFn) {}
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn relative(path: &Path) -> String {
    path.strip_prefix(root()).unwrap_or(path).to_string_lossy().into_owned()
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn lines(path: &Path) -> usize {
    read(path).lines().count()
}

fn parse(path: &Path) -> syn::File {
    syn::parse_file(&read(path)).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn rust_sources() -> Vec<PathBuf> {
    sources().into_iter().filter(|path| path.extension().is_some_and(|e| e == "rs")).collect()
}

/// Every hand-written source file.
fn sources() -> Vec<PathBuf> {
    let mut found = vec![root().join("build.rs"), root().join("Makefile")];
    for folder in ["rust", "cuda", "include", "cpp_shim", "python_plugin", "tests"] {
        walk(&root().join(folder), &mut found);
    }
    let kinds = ["rs", "c", "h", "hpp", "cpp", "cu", "cuh", "py", "cmake", "sh", "toml", ""];
    found.retain(|path| {
        let kind = path.extension().map_or(String::new(), |e| e.to_string_lossy().into_owned());
        kinds.contains(&kind.as_str()) && !GENERATED.contains(&relative(path).as_str())
    });
    found
}

fn walk(folder: &Path, found: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let path = entry.path();
        let name = entry.file_name().to_string_lossy().into_owned();
        let skipped =
            name.starts_with('.') || ["build", "dist", "__pycache__", "record"].contains(&name.as_str());
        match (path.is_dir(), skipped) {
            (_, true) => {}
            (true, false) => walk(&path, found),
            (false, false) => found.push(path),
        }
    }
}
