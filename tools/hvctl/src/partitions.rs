// SPDX-License-Identifier: GPL-2.0
//! The worker processes of running partitions, found by their control sockets.

use crate::{Error, Result};
use serde::Serialize;
use std::io::ErrorKind;
use std::path::Path;
use std::time::{Duration, Instant};
use vmwp::control::{socket, Client, Request, Status};

/// How long a partition may take to stop.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// A control socket and who is behind it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Listed {
    /// Name of the partition: that of its socket, which is what other commands take.
    pub name: String,
    /// running, dead (its process was killed), no permission, or silent.
    pub state: String,
    /// What it tells about itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<Status>,
}

/// All partitions with a socket in `dir`, by name.
pub fn list(dir: &Path) -> Result<Vec<Listed>> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        // The first `run` makes the folder.
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(Error::file(dir)(e)),
    };
    let mut names: Vec<String> = entries
        .flatten()
        .filter_map(|e| Some(e.file_name().to_str()?.strip_suffix(".sock")?.to_owned()))
        .collect();
    names.sort();
    Ok(names.into_iter().map(|name| look(dir, name)).collect())
}

fn look(dir: &Path, name: String) -> Listed {
    let asked = Client::connect(&socket(dir, &name)).and_then(|mut c| c.ask(Request::Status));
    let (state, status) = match asked {
        Ok(reply) => ("running", reply.status),
        Err(e) if e.kind() == ErrorKind::ConnectionRefused => ("dead", None),
        Err(e) if e.kind() == ErrorKind::PermissionDenied => ("no permission", None),
        Err(_) => ("silent", None),
    };
    Listed {
        name,
        state: state.into(),
        status,
    }
}

/// Connects to a partition.
pub fn connect(dir: &Path, name: &str) -> Result<Client> {
    let path = socket(dir, name);
    Client::connect(&path).map_err(|e| match e.kind() {
        ErrorKind::NotFound | ErrorKind::ConnectionRefused => Error::NoPartition(name.into()),
        ErrorKind::PermissionDenied => Error::Permission(path),
        _ => Error::Worker {
            name: name.into(),
            source: e,
        },
    })
}

/// Is there a live partition of this name?
pub fn is_alive(dir: &Path, name: &str) -> bool {
    Client::connect(&socket(dir, name)).is_ok()
}

/// Stops a partition and waits until it is gone.
pub fn stop(dir: &Path, name: &str) -> Result<()> {
    let failed = |source| Error::Worker {
        name: name.into(),
        source,
    };
    connect(dir, name)?.ask(Request::Stop).map_err(failed)?;
    let begun = Instant::now();
    while is_alive(dir, name) {
        if begun.elapsed() > STOP_TIMEOUT {
            return Err(failed(ErrorKind::TimedOut.into()));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::net::UnixListener;
    use std::thread::JoinHandle;
    use vmm_sys_util::tempdir::TempDir;
    use vmwp::control::{parse_request, Reply};

    /// A worker process that answers until it is stopped.
    pub(crate) fn fake_worker(dir: &Path, name: &str) -> JoinHandle<()> {
        let path = socket(dir, name);
        let listener = UnixListener::bind(&path).unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = BufReader::new(stream.unwrap());
                let mut line = String::new();
                if stream.read_line(&mut line).unwrap() == 0 {
                    continue;
                }
                let status = Status {
                    name: "other".into(),
                    vps: 3,
                    ..Default::default()
                };
                let (reply, end) = match parse_request(&line) {
                    Ok(Request::Status) => (
                        Reply {
                            status: Some(status),
                            ..Reply::done()
                        },
                        false,
                    ),
                    Ok(Request::Stop) => (Reply::done(), true),
                    _ => (Reply::refused("no"), false),
                };
                stream.get_mut().write_all(reply.line().as_bytes()).unwrap();
                if end {
                    std::fs::remove_file(&path).unwrap();
                    return;
                }
            }
        })
    }

    #[test]
    fn running_and_dead_partitions_are_listed_by_name() {
        let dir = TempDir::new().unwrap();
        drop(UnixListener::bind(socket(dir.as_path(), "a")).unwrap());
        let worker = fake_worker(dir.as_path(), "b");
        std::fs::write(dir.as_path().join("b.log"), "").unwrap();
        let l = list(dir.as_path()).unwrap();
        assert_eq!(
            l.iter()
                .map(|p| (p.name.as_str(), p.state.as_str()))
                .collect::<Vec<_>>(),
            [("a", "dead"), ("b", "running")]
        );
        assert_eq!(l[1].status.as_ref().unwrap().vps, 3);
        let json = serde_json::to_value(&l).unwrap();
        assert_eq!(json[1]["name"], "b");
        assert_eq!(json[1]["status"]["vps"], 3);
        stop(dir.as_path(), "b").unwrap();
        worker.join().unwrap();
    }

    #[test]
    fn a_missing_folder_means_no_partitions() {
        assert_eq!(list(Path::new("/nonexistent")).unwrap(), []);
    }

    #[test]
    fn stopping_what_does_not_run_says_so() {
        let dir = TempDir::new().unwrap();
        assert!(matches!(
            stop(dir.as_path(), "x"),
            Err(Error::NoPartition(_))
        ));
        drop(UnixListener::bind(socket(dir.as_path(), "x")).unwrap());
        assert!(matches!(
            stop(dir.as_path(), "x"),
            Err(Error::NoPartition(_))
        ));
    }
}
