//! Where the real programs are.

use std::fs;
use std::path::{Path, PathBuf};

/// The program's path; Debian keeps servers in directories that are not in every PATH.
pub fn find(name: &str) -> Option<PathBuf> {
    if let Some(tool) = name.strip_prefix("postgresql:") {
        return postgresql(tool);
    }
    if name == "python3" && is_program(Path::new("/usr/bin/python3")) {
        // A version manager's stand-in is a shell script: not the program that is meant.
        return Some("/usr/bin/python3".into());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/bin"].map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|p| is_program(p))
}

/// Debian keeps each version of PostgreSQL in a directory of its own: the newest.
fn postgresql(tool: &str) -> Option<PathBuf> {
    let versions = fs::read_dir("/usr/lib/postgresql").ok()?;
    let newest = versions.flatten().filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok()).max()?;
    let path = PathBuf::from(format!("/usr/lib/postgresql/{newest}/bin/{tool}"));
    is_program(&path).then_some(path)
}

fn is_program(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt as _;
    fs::metadata(path).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}
