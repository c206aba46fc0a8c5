// SPDX-License-Identifier: GPL-2.0
//! The status document of the kernel module: one JSON object in debugfs.
//!
//! It is read leniently: fields that are missing or of an unexpected kind become empty, fields that are unknown are
//! kept where people see them. So `hvctl` and the module may differ in version.

use crate::{Error, Result};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::ffi::CString;
use std::io::ErrorKind;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Environment variable that names another debugfs.
pub const DEBUGFS_VARIABLE: &str = "HV_DEBUGFS";
/// Where debugfs is usually mounted.
const DEBUGFS: &str = "/sys/kernel/debug";
/// The document, from debugfs on.
const DOCUMENT: &str = "hv_core/status";
/// Exists while the module is loaded.
const MODULE: &str = "/sys/module/hv_core";

/// What the module tells.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Status {
    /// Is the hypervisor running?
    #[serde(deserialize_with = "lenient")]
    pub state: String,
    /// Which virtualization extension it uses.
    #[serde(deserialize_with = "lenient")]
    pub vendor: String,
    /// The hypervisor image.
    #[serde(deserialize_with = "lenient")]
    pub image: Image,
    /// Memory held, in bytes by use.
    #[serde(deserialize_with = "lenient")]
    pub memory: Map<String, Value>,
    /// What a change to and from a child does against speculation.
    #[serde(deserialize_with = "lenient")]
    pub mitigations: Option<Vec<String>>,
    /// Every capability that was checked.
    #[serde(deserialize_with = "lenient")]
    pub caps: Vec<Cap>,
    /// Every CPU.
    #[serde(deserialize_with = "lenient")]
    pub cpus: Vec<Cpu>,
    /// Every child partition.
    #[serde(deserialize_with = "lenient")]
    pub partitions: Vec<Map<String, Value>>,
    /// Why the launch was refused.
    #[serde(deserialize_with = "lenient")]
    pub refusal: Option<String>,
}

/// The hypervisor image.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Image {
    /// Bytes.
    #[serde(deserialize_with = "lenient")]
    pub size: Option<u64>,
    /// Its fingerprint.
    pub hash: Value,
    /// Where it is.
    pub base: Value,
    /// What else is told.
    #[serde(flatten)]
    pub other: BTreeMap<String, Value>,
}

/// A row of the capability table.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Cap {
    /// Its name.
    #[serde(deserialize_with = "lenient")]
    pub name: String,
    /// Why it is needed.
    #[serde(deserialize_with = "lenient")]
    pub why: String,
    /// What the machine has.
    pub found: Value,
    /// What is needed.
    pub required: Value,
    /// Is it enough?
    #[serde(deserialize_with = "lenient")]
    pub ok: Option<bool>,
}

/// A CPU.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Cpu {
    /// Its number.
    pub cpu: Value,
    /// Is it beneath the hypervisor?
    pub state: Value,
    /// Exits of the root by reason.
    #[serde(deserialize_with = "lenient")]
    pub exits: Map<String, Value>,
}

impl Cpu {
    /// Exits that happened at all, most frequent first.
    pub fn exits(&self) -> Vec<(&str, u64)> {
        let mut list: Vec<_> = self
            .exits
            .iter()
            .filter_map(|(k, v)| Some((k.as_str(), v.as_u64()?)))
            .filter(|(_, n)| *n > 0)
            .collect();
        list.sort_by_key(|(_, n)| std::cmp::Reverse(*n));
        list
    }
}

/// A field that has the wrong kind is as good as none.
fn lenient<'de, D, T>(deserializer: D) -> std::result::Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: DeserializeOwned + Default,
{
    Ok(serde_json::from_value(Value::deserialize(deserializer)?).unwrap_or_default())
}

impl Status {
    /// Takes what is understood out of a document.
    pub fn from_document(document: &Value) -> Self {
        Status::deserialize(document).unwrap_or_default()
    }
}

/// Where debugfs is.
pub fn debugfs() -> PathBuf {
    std::env::var_os(DEBUGFS_VARIABLE).map_or_else(|| DEBUGFS.into(), PathBuf::from)
}

/// Reads the document.
pub fn read(debugfs: &Path) -> Result<Value> {
    let path = debugfs.join(DOCUMENT);
    match std::fs::read_to_string(&path) {
        Ok(text) => parse(&path, &text),
        Err(e) => Err(explain(debugfs, path, &e)),
    }
}

fn parse(path: &Path, text: &str) -> Result<Value> {
    let wrong = |why: String| Error::Status {
        path: path.to_owned(),
        why,
    };
    let document: Value =
        serde_json::from_str(text).map_err(|e| wrong(format!("it is no JSON: {e}")))?;
    if document.is_object() {
        Ok(document)
    } else {
        Err(wrong("it is no JSON object".into()))
    }
}

/// Why there is no document.
fn explain(debugfs: &Path, path: PathBuf, e: &std::io::Error) -> Error {
    match e.kind() {
        // debugfs is closed for everybody but root, so nothing behind it can be told apart.
        ErrorKind::PermissionDenied => Error::Permission(path),
        ErrorKind::NotFound if !Path::new(MODULE).exists() => Error::NotLoaded,
        ErrorKind::NotFound if !is_debugfs(debugfs) => Error::NoDebugfs {
            path: debugfs.display().to_string(),
        },
        ErrorKind::NotFound => Error::NoStatus(path),
        _ => Error::Status {
            path,
            why: e.to_string(),
        },
    }
}

fn is_debugfs(path: &Path) -> bool {
    const DEBUGFS_MAGIC: i64 = 0x6462_6720;
    let Ok(path) = CString::new(path.as_os_str().as_bytes()) else {
        return false;
    };
    // SAFETY: statfs is plain data, the path ends with a zero, and the result is only used after success.
    unsafe {
        let mut info: libc::statfs = std::mem::zeroed();
        libc::statfs(path.as_ptr(), &mut info) == 0 && info.f_type == DEBUGFS_MAGIC
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use vmm_sys_util::tempdir::TempDir;

    pub(crate) const RUNNING: &str = r#"{
        "state": "running", "vendor": "amd-v",
        "image": {"size": 196608, "hash": "1f2e3d4c", "base": "0x7c000000", "stacks": 2},
        "memory": {"image_bytes": 196608, "per_cpu_bytes": 49152, "pool_bytes": 4194304},
        "caps": [
            {"name": "svm", "why": "runs guests at all", "found": "yes", "required": "yes", "ok": true},
            {"name": "asids", "why": "a tag for each partition", "found": 16, "required": 2, "ok": true}
        ],
        "cpus": [
            {"cpu": 0, "state": "in", "exits": {"cpuid": 12, "msr": 0, "vmmcall": 40}},
            {"cpu": 1, "state": "in", "exits": {}}
        ],
        "partitions": [{"id": 2, "vps": 2, "memory_bytes": 536870912}],
        "refusal": null
    }"#;

    fn status(text: &str) -> Status {
        Status::from_document(&serde_json::from_str(text).unwrap())
    }

    #[test]
    fn a_running_hypervisor_is_read_in_full() {
        let s = status(RUNNING);
        assert_eq!((s.state.as_str(), s.vendor.as_str()), ("running", "amd-v"));
        assert_eq!(s.image.size, Some(196608));
        assert_eq!(s.image.other["stacks"], 2);
        assert_eq!(s.caps[1].found, 16);
        assert_eq!(s.cpus[0].exits(), [("vmmcall", 40), ("cpuid", 12)]);
        assert_eq!(s.partitions[0]["vps"], 2);
        assert_eq!(s.refusal, None);
    }

    #[test]
    fn missing_and_strange_fields_do_not_hide_the_rest() {
        let s = status(
            r#"{"state":"refused","image":null,"caps":"none","cpus":[{"cpu":0}],"refusal":"no svm","new":[1]}"#,
        );
        assert_eq!(s.state, "refused");
        assert_eq!(s.image, Image::default());
        assert!(s.caps.is_empty());
        assert_eq!(s.cpus.len(), 1);
        assert_eq!(s.refusal.as_deref(), Some("no svm"));
        assert_eq!(status("{}"), Status::default());
    }

    #[test]
    fn the_document_is_read_from_debugfs() {
        let dir = TempDir::new().unwrap();
        std::fs::create_dir(dir.as_path().join("hv_core")).unwrap();
        std::fs::write(dir.as_path().join(DOCUMENT), RUNNING).unwrap();
        assert_eq!(read(dir.as_path()).unwrap()["state"], "running");
        for broken in ["", "[]", "{"] {
            std::fs::write(dir.as_path().join(DOCUMENT), broken).unwrap();
            assert!(
                matches!(read(dir.as_path()), Err(Error::Status { .. })),
                "{broken}"
            );
        }
    }

    #[test]
    fn without_the_module_the_error_says_so() {
        if Path::new(MODULE).exists() {
            return;
        }
        assert!(matches!(
            read(Path::new("/nonexistent")),
            Err(Error::NotLoaded)
        ));
    }

    #[test]
    fn an_ordinary_folder_is_no_debugfs() {
        assert!(!is_debugfs(Path::new("/")));
        assert!(!is_debugfs(Path::new("/nonexistent")));
    }
}
