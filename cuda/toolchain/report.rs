//! What ptxas says of an image (`-v`): its kernels, and what a kernel may not have.

/// Names of the kernels, in the order ptxas met them.
pub(super) fn kernels(report: &str) -> Vec<String> {
    let names = report.lines().filter_map(|line| quoted_after(line, "Compiling entry function '"));
    names.map(str::to_owned).collect()
}

/// Spilled registers, and notes C75xx: `wgmma` that ptxas had to serialize.
pub(super) fn faults(report: &str) -> Vec<String> {
    let mut faults = Vec::new();
    let mut function = "";
    for line in report.lines() {
        if let Some((_, name)) = line.split_once("Function properties for ") {
            function = name.trim();
        }
        let spilled = bytes_before(line, "bytes spill stores") + bytes_before(line, "bytes spill loads");
        if spilled > 0 {
            faults.push(format!("{function}: registers spill: {}", line.trim()));
        }
        if line.contains("(C75") {
            faults.push(line.trim().to_owned());
        }
    }
    faults
}

fn quoted_after<'a>(line: &'a str, words: &str) -> Option<&'a str> {
    let (_, rest) = line.split_once(words)?;
    rest.split('\'').next()
}

/// The number that stands before `words`; 0 without them.
fn bytes_before(line: &str, words: &str) -> u64 {
    let before = line.split_once(words).and_then(|(before, _)| before.split_whitespace().last());
    before.and_then(|number| number.parse().ok()).unwrap_or(0)
}
