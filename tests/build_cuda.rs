//! How `build.rs` finds nvcc and keeps images, on a small source tree and an nvcc that is a shell script. It counts its
//! compilations and says of each kernel what ptxas would; real ones are `make kernels`.
#![cfg(unix)]
#![expect(clippy::unwrap_used, reason = "tests")]

#[path = "../cuda/toolchain/mod.rs"]
mod toolchain;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};

use toolchain::Place;

#[test]
fn without_nvcc_auto_builds_for_the_cpu_and_says_so() {
    let tree = Tree::new("cpu");
    let lines = tree.build(&[]).unwrap();
    assert!(
        lines.iter().any(|line| line.starts_with("warning=building without GPU kernels: no nvcc")),
        "{lines:?}"
    );
    assert!(tree.kernels_rs().contains("IMAGES: &[Image] = &[\n];"), "{}", tree.kernels_rs());
}

#[test]
fn without_nvcc_require_fails_and_names_the_remedy() {
    let tree = Tree::new("require");
    let text = tree.build(&[("COMPACTATTN_CUDA", "require")]).unwrap_err();
    assert!(text.contains("no nvcc 12.8 or newer was found; run cuda/toolkit.sh"), "{text}");
    let text = tree.build(&[("COMPACTATTN_CUDA", "yes")]).unwrap_err();
    assert!(text.contains("auto, require or off"), "{text}");
}

#[test]
fn off_and_docs_rs_look_for_nothing() {
    let tree = Tree::new("off");
    let nvcc = tree.nvcc("13.0.88", "");
    for variable in [("COMPACTATTN_CUDA", "off"), ("DOCS_RS", "1")] {
        let lines = tree.build(&[("NVCC", &nvcc), variable]).unwrap();
        assert_eq!(lines, ["rerun-if-env-changed=COMPACTATTN_CUDA", "rerun-if-env-changed=DOCS_RS"]);
        assert_eq!((tree.compiled(), tree.kernels_rs().contains("fatbin")), (0, false));
    }
}

#[test]
fn units_are_found_by_themselves_and_hopper_code_is_for_hopper() {
    let tree = Tree::new("units");
    let nvcc = tree.nvcc("13.0.88", "");
    tree.build(&[("NVCC", &nvcc), ("NUM_JOBS", "3")]).unwrap();
    let text = tree.kernels_rs();
    let archs = |unit: &str| {
        let lines = text.lines().filter(|line| line.contains(&format!("unit: \"{unit}\"")));
        lines.map(|line| between(line, "arch: \"", "\"").to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(archs("plan/plan"), ["sm_80", "sm_90a", "sm_100a", "sm_120a"]);
    assert_eq!(archs("attend/sm90/inst/one"), ["sm_90a"]);
    assert_eq!(tree.compiled(), 5);
    assert!(
        text.contains("kernels: &[\"k_plan\"]") && text.contains("NVCC_VERSION: &str = \"13.0.88\""),
        "{text}"
    );
    let image = tree.root.join("out/kernels/attend-sm90-inst-one.sm_90a.fatbin");
    assert_eq!(fs::read_to_string(image).unwrap(), "image for sm_90a\n");
}

#[test]
fn an_image_is_made_once_and_again_when_what_it_reads_changes() {
    let tree = Tree::new("cache");
    let nvcc = tree.nvcc("13.0.88", "");
    let build = |variables: &[(&str, &str)]| {
        let before = tree.compiled();
        tree.build(&[&[("NVCC", nvcc.as_str())], variables].concat()).unwrap();
        tree.compiled() - before
    };
    assert_eq!(build(&[]), 5);
    assert_eq!(build(&[]), 0);
    // A header of one unit; one of both, reached through the other; one that nobody reads.
    tree.write("cuda/attend/sm90/kernel.cuh", "#include \"../../params.h\"\n// changed\n");
    assert_eq!(build(&[]), 1);
    tree.write("cuda/params.h", "// changed\n");
    assert_eq!(build(&[]), 5);
    tree.write("cuda/plan/other.cuh", "// changed\n");
    assert_eq!(build(&[]), 0);
    tree.write("cutlass/include/cutlass/version.h", "#define CUTLASS_MAJOR 5\n");
    assert_eq!(build(&[]), 5);
    assert_eq!(build(&[("NVCC_APPEND_FLAGS", "-G")]), 5);
    tree.nvcc("13.1.2", "");
    assert_eq!(build(&[]), 5);
    // Another OUT_DIR, the same cache.
    fs::remove_dir_all(tree.root.join("out")).unwrap();
    fs::create_dir(tree.root.join("out")).unwrap();
    assert_eq!(build(&[]), 0);
    assert!(tree.root.join("out/kernels/plan-plan.sm_80.fatbin").is_file());
}

#[test]
fn an_image_cut_short_is_made_again() {
    let tree = Tree::new("cut");
    let nvcc = tree.nvcc("13.0.88", "");
    tree.build(&[("NVCC", &nvcc)]).unwrap();
    for file in fs::read_dir(tree.root.join("cache")).unwrap() {
        let path = file.unwrap().path();
        if path.to_string_lossy().contains("sm_80") && path.extension().unwrap() == "fatbin" {
            fs::write(path, "").unwrap();
        }
    }
    tree.build(&[("NVCC", &nvcc)]).unwrap();
    assert_eq!(tree.compiled(), 6);
}

#[test]
fn spills_and_serialized_wgmma_are_errors_only_where_kernels_are_required() {
    let serialized = "ptxas info : (C7510) Potential Performance Loss: wgmma serialized in 'k_one'";
    let spill = "    8 bytes stack frame, 4 bytes spill stores, 0 bytes spill loads";
    for (i, words) in [spill, serialized].into_iter().enumerate() {
        let tree = Tree::new(&format!("faults{i}"));
        let nvcc = tree.nvcc("13.0.88", words);
        let lines = tree.build(&[("NVCC", &nvcc)]).unwrap();
        assert!(
            lines.iter().any(|line| line.starts_with("warning=") && line.contains(words.trim())),
            "{lines:?}"
        );
        // From the cache now: what was said of an image stays said.
        let text = tree.build(&[("NVCC", &nvcc), ("COMPACTATTN_CUDA", "require")]).unwrap_err();
        assert!(text.contains(words.trim()) && text.contains("plan/plan for sm_80"), "{text}");
        assert_eq!(tree.compiled(), 5);
    }
}

#[test]
fn an_old_nvcc_is_passed_over_for_the_next() {
    let tree = Tree::new("old");
    let old = tree.script("old/nvcc", "echo 'Cuda compilation tools, release 11.8, V11.8.89'");
    let new = tree.nvcc("13.0.88", "");
    let home = Path::new(&new).ancestors().nth(2).unwrap().to_str().unwrap();
    let lines = tree.build(&[("NVCC", &old), ("CUDA_HOME", home)]).unwrap();
    assert!(
        lines.contains(&"warning=NVCC: nvcc 11.8.89 is too old; 12.8 or newer is wanted".to_owned()),
        "{lines:?}"
    );
    assert_eq!(tree.compiled(), 5);
}

#[test]
fn a_toolkit_is_found_in_each_place_it_can_be_with_the_headers_beside_it() {
    let tree = Tree::new("places");
    tree.write("cuda/requirements.txt", "nvidia-cuda-nvcc==13.0.88\n");
    let hash = sha256sum(&tree.root.join("cuda/requirements.txt"));
    let cached = format!("xdg/compactattn/toolkit-{}", &hash[..16]);
    // The Python prints two lines, as the search program would: the folders of `nvidia` and `cutlass_library`.
    let wheels = tree.root.join("wheels");
    tree.script("python", &format!("echo {0}/nvidia; echo {0}/cutlass_library", wheels.display()));
    let places = [
        ("", "system", "system/bin"),
        ("COMPACTATTN_PYTHON", "python", "wheels/nvidia/cu13/bin"),
        ("XDG_CACHE_HOME", "xdg", &format!("{cached}/nvidia/cu13/bin")),
        ("PATH", "path", "path"),
        ("CUDA_PATH", "cuda_path", "cuda_path/bin"),
        ("CUDA_HOME", "wheels/nvidia/cu13", "wheels/nvidia/cu13/bin"),
        ("NVCC", "mine/nvcc", "mine"),
    ];
    let mut variables = vec![("CUTLASS_DIR", String::new())];
    for folder in ["wheels", &cached] {
        tree.write(&format!("{folder}/cutlass_library/source/include/cutlass/version.h"), "\n");
    }
    // Each place goes before those that came before it here.
    for (i, (variable, value, folder)) in places.into_iter().enumerate() {
        let version = format!("13.0.{i}");
        tree.nvcc_at(&format!("{folder}/nvcc"), &version, "");
        variables.push((variable, tree.root.join(value).to_str().unwrap().to_owned()));
        let given: Vec<_> = variables.iter().map(|(name, value)| (*name, value.as_str())).collect();
        // The system's place has no headers of its own.
        let given = if i == 0 { vec![] } else { given };
        tree.build(&given).unwrap();
        assert!(tree.kernels_rs().contains(&format!("NVCC_VERSION: &str = {version:?}")), "{variable}");
    }
}

#[test]
fn headers_that_are_missing_are_named() {
    let tree = Tree::new("headers");
    let nvcc = tree.nvcc("13.0.88", "");
    fs::remove_dir_all(tree.root.join("cutlass")).unwrap();
    let text = tree.build(&[("NVCC", &nvcc), ("COMPACTATTN_CUDA", "require")]).unwrap_err();
    assert!(text.contains("CUTLASS's headers were not found"), "{text}");
}

#[test]
fn a_kernel_that_does_not_compile_is_an_error_in_either_mode() {
    let tree = Tree::new("broken");
    let nvcc = tree.nvcc("13.0.88", "");
    tree.write("cuda/plan/plan.cu", "#error broken\n");
    for mode in ["auto", "require"] {
        let text = tree.build(&[("NVCC", &nvcc), ("COMPACTATTN_CUDA", mode)]).unwrap_err();
        assert!(text.contains("cuda/plan/plan.cu does not compile for sm_120a"), "{text}");
        assert!(text.contains("says the compiler"), "{text}");
    }
}

/// A source tree with two units, CUTLASS's version header, a folder for the cache and one for the output. One at a time:
/// a script that one test writes is busy as long as a child of another has it open.
struct Tree {
    root: PathBuf,
    _alone: MutexGuard<'static, ()>,
}

static ALONE: Mutex<()> = Mutex::new(());

impl Tree {
    fn new(name: &str) -> Self {
        let root = Path::new(env!("CARGO_TARGET_TMPDIR")).join("build_cuda").join(name);
        let _ = fs::remove_dir_all(&root);
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let tree = Self { root, _alone: alone };
        tree.write("cuda/params.h", "\n");
        tree.write("cuda/plan/plan.cu", "  #  include \"../params.h\"\n");
        tree.write("cuda/attend/sm90/kernel.cuh", "#include \"../../params.h\"\n");
        tree.write("cuda/attend/sm90/inst/one.cu", "#include <cutlass/x.h>\n#include \"../kernel.cuh\"\n");
        tree.write("cutlass/include/cutlass/version.h", "#define CUTLASS_MAJOR 4\n");
        fs::create_dir(tree.root.join("out")).unwrap();
        tree
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn script(&self, path: &str, text: &str) -> String {
        self.write(path, &format!("#!/bin/sh\n{text}\n"));
        let path = self.root.join(path);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path.to_str().unwrap().to_owned()
    }

    fn nvcc(&self, version: &str, words: &str) -> String {
        self.nvcc_at("toolkit/bin/nvcc", version, words)
    }

    /// An nvcc that writes one line for an image and says `words` of its kernel.
    fn nvcc_at(&self, path: &str, version: &str, words: &str) -> String {
        let counter = self.root.join("compiled");
        let text = format!(
            r#"case "$1" in --version) echo "Cuda compilation tools, release x, V{version}"; exit;; esac
for argument; do
    case "$argument" in -gencode*) arch=${{argument##*code=}};; esac
    [ "$last" = -o ] && out=$argument
    last=$argument
done
grep -q '#error' "$last" && echo "so says the compiler" >&2 && exit 1
# The first job is not the first to end.
[ $arch = sm_80 ] && sleep 0.05
echo "$last $arch" >> '{}'
echo "image for $arch" > "$out"
kernel=k_$(basename "$last" .cu)
echo "ptxas info    : Compiling entry function '$kernel' for '$arch'" >&2
echo "ptxas info    : Function properties for $kernel" >&2
echo "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" >&2
echo "{words}" >&2"#,
            counter.display()
        );
        self.script(path, &text)
    }

    /// How often the compiler ran.
    fn compiled(&self) -> usize {
        fs::read_to_string(self.root.join("compiled")).map_or(0, |text| text.lines().count())
    }

    fn kernels_rs(&self) -> String {
        fs::read_to_string(self.root.join("out/kernels.rs")).unwrap()
    }

    /// Builds with these variables and no others, so that no toolkit of the machine is met. An empty one is not set.
    fn build(&self, variables: &[(&str, &str)]) -> Result<Vec<String>, String> {
        let (cache, cutlass) = (self.root.join("cache"), self.root.join("cutlass"));
        let mut all = BTreeMap::from([
            ("COMPACTATTN_KERNEL_CACHE", cache.to_str().unwrap()),
            ("CUTLASS_DIR", cutlass.to_str().unwrap()),
            ("COMPACTATTN_PYTHON", "no-such-python"),
        ]);
        all.extend(variables.iter().copied());
        let env =
            |name: &str| all.get(name).filter(|value| !value.is_empty()).map(|value| (*value).to_owned());
        let (out, system) = (self.root.join("out"), self.root.join("system"));
        toolchain::build(&Place { root: &self.root, out: &out, system: &system, env: &env })
    }
}

fn between<'a>(line: &'a str, before: &str, after: &str) -> &'a str {
    line.split_once(before).unwrap().1.split_once(after).unwrap().0
}

/// The one that cuda/toolkit.sh computes, by another program.
fn sha256sum(path: &Path) -> String {
    let program = "import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], 'rb').read()).hexdigest())";
    let output = Command::new("python3").args(["-c", program]).arg(path).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}
