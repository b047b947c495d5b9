//! Finds the library to preload.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use netkernel_abi::control::env;

const NAME: &str = "libnetkernel.so";

/// `$NETKERNEL_LIBRARY`, beside the command, or in `../lib/netkernel/`.
pub fn find() -> Result<PathBuf> {
    let mut tried = Vec::new();
    if let Some(path) = std::env::var_os(env::LIBRARY).filter(|p| !p.is_empty()) {
        tried.push(PathBuf::from(path));
    }
    if let Some(dir) = std::env::current_exe().ok().as_deref().and_then(Path::parent) {
        tried.push(dir.join(NAME));
        tried.push(dir.join("../lib/netkernel").join(NAME));
        // A test's executable stands in target/*/deps.
        tried.push(dir.join("..").join(NAME));
    }
    for path in &tried {
        if let Ok(path) = path.canonicalize()
            && path.is_file()
        {
            if path.as_os_str().as_encoded_bytes().iter().any(|b| b" :\t\n".contains(b)) {
                bail!(
                    "the dynamic loader cannot preload {}: move it to a path without spaces and colons",
                    path.display()
                );
            }
            return Ok(path);
        }
    }
    let tried = tried.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(", ");
    bail!("{NAME} was not found (tried {tried}): set {} to its path", env::LIBRARY)
}

/// The value of LD_PRELOAD with our library first and once.
pub fn preload(library: &Path, before: Option<&OsStr>) -> OsString {
    let mut value = library.as_os_str().to_owned();
    let rest = before.map(without).unwrap_or_default();
    if !rest.is_empty() {
        value.push(":");
        value.push(rest);
    }
    value
}

/// A value of LD_PRELOAD without our library.
pub fn without(value: &OsStr) -> OsString {
    let entries: Vec<&[u8]> = value
        .as_bytes()
        .split(|b| b" :".contains(b))
        .filter(|e| !e.is_empty() && Path::new(OsStr::from_bytes(e)).file_name() != Some(NAME.as_ref()))
        .collect();
    OsString::from_vec(entries.join(&b':'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ours_comes_first_and_others_stay() {
        let ours = Path::new("/opt/libnetkernel.so");
        assert_eq!(preload(ours, None), "/opt/libnetkernel.so");
        assert_eq!(preload(ours, Some("".as_ref())), "/opt/libnetkernel.so");
        assert_eq!(
            preload(ours, Some("/a/libjemalloc.so /b.so".as_ref())),
            "/opt/libnetkernel.so:/a/libjemalloc.so:/b.so"
        );
        assert_eq!(preload(ours, Some("/old/libnetkernel.so:/b.so".as_ref())), "/opt/libnetkernel.so:/b.so");
    }
}
