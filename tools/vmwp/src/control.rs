// SPDX-License-Identifier: GPL-2.0
//! The protocol of the control socket: one JSON object a line, each request answered by one reply.
//!
//! ```text
//! → {"op":"status"}            ← {"ok":true,"status":{…}}
//! → {"op":"stop"}              ← {"ok":true}      then the partition ends
//! → {"op":"console"}           ← {"ok":true}      then both directions are raw console bytes
//! → {"op":"dance"}             ← {"ok":false,"error":"…"}
//! ```
//!
//! After `console` the server first sends what it remembers of the output, then everything new. The connection ends
//! with the partition.

use crate::vp::stats::VpExits;
use serde::{Deserialize, Serialize};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Longest request line.
pub const LINE_MAX: usize = 4096;
/// How long a client waits for a reply.
pub const REPLY_TIMEOUT: Duration = Duration::from_secs(5);
/// Where the sockets are, unless [`RUN_DIR_VARIABLE`] says otherwise.
pub const RUN_DIR: &str = "/run/hv";
/// Environment variable that names another folder for the sockets.
pub const RUN_DIR_VARIABLE: &str = "HV_RUN_DIR";

/// A request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "lowercase")]
pub enum Request {
    /// Tell what runs.
    Status,
    /// End the partition at once, like pulling the plug.
    Stop,
    /// Attach to the console.
    Console,
}

/// A reply.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reply {
    /// Was it done?
    pub ok: bool,
    /// Why not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Answer to [`Request::Status`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<Status>,
}

impl Reply {
    /// Done.
    pub fn done() -> Self {
        Reply {
            ok: true,
            ..Default::default()
        }
    }

    /// Refused.
    pub fn refused(why: impl Into<String>) -> Self {
        Reply {
            error: Some(why.into()),
            ..Default::default()
        }
    }

    /// As a line.
    pub fn line(&self) -> String {
        // Strings, numbers and options always serialize.
        let mut line = serde_json::to_string(self).unwrap_or_else(|_| r#"{"ok":false}"#.into());
        line.push('\n');
        line
    }
}

/// A running partition.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Status {
    /// Name.
    pub name: String,
    /// Process id of the worker process.
    pub pid: u32,
    /// Kernel file.
    pub kernel: PathBuf,
    /// Number of VPs.
    pub vps: u32,
    /// Bytes of memory.
    pub memory: u64,
    /// Milliseconds since the VPs started.
    pub uptime_ms: u64,
    /// Bytes that the guest wrote to its console.
    pub console_bytes: u64,
    /// Exits by VP.
    pub exits: Vec<VpExits>,
}

/// Folder of the control sockets.
pub fn run_dir() -> PathBuf {
    std::env::var_os(RUN_DIR_VARIABLE).map_or_else(|| RUN_DIR.into(), PathBuf::from)
}

/// Socket of the partition `name` in `dir`.
pub fn socket(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{name}.sock"))
}

/// Reads a request line.
pub fn parse_request(line: &str) -> Result<Request, String> {
    serde_json::from_str(line)
        .map_err(|e| format!("not a request: {e}; known are status, stop and console"))
}

/// A client's connection.
pub struct Client {
    stream: BufReader<UnixStream>,
}

impl Client {
    /// Connects to a worker process.
    pub fn connect(socket: &Path) -> io::Result<Self> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(REPLY_TIMEOUT))?;
        stream.set_write_timeout(Some(REPLY_TIMEOUT))?;
        Ok(Client {
            stream: BufReader::new(stream),
        })
    }

    /// Sends a request and waits for its reply; a refusal is an error.
    pub fn ask(&mut self, request: Request) -> io::Result<Reply> {
        let mut line = serde_json::to_string(&request)?;
        line.push('\n');
        self.stream.get_mut().write_all(line.as_bytes())?;
        let mut answer = String::new();
        if self.stream.read_line(&mut answer)? == 0 {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the worker process closed the connection",
            ));
        }
        let reply: Reply = serde_json::from_str(&answer)?;
        match reply.error {
            _ if reply.ok => Ok(reply),
            why => Err(io::Error::other(
                why.unwrap_or_else(|| "refused without a reason".into()),
            )),
        }
    }

    /// Attaches to the console. Returns the stream and what already came with the reply.
    pub fn into_console(mut self) -> io::Result<(UnixStream, Vec<u8>)> {
        self.ask(Request::Console)?;
        let early = self.stream.buffer().to_vec();
        let stream = self.stream.into_inner();
        stream.set_read_timeout(None)?;
        stream.set_write_timeout(None)?;
        Ok((stream, early))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_have_the_documented_form() {
        assert_eq!(
            serde_json::to_string(&Request::Status).unwrap(),
            r#"{"op":"status"}"#
        );
        assert_eq!(parse_request(r#"{"op":"stop"}"#), Ok(Request::Stop));
        assert_eq!(
            parse_request(r#"{"op":"console","later":1}"#),
            Ok(Request::Console)
        );
    }

    #[test]
    fn nonsense_is_refused_with_the_known_requests() {
        for line in ["", "x", "{}", r#"{"op":"dance"}"#, "[1]"] {
            assert!(
                parse_request(line).unwrap_err().contains("known are"),
                "{line}"
            );
        }
    }

    #[test]
    fn replies_are_single_lines_without_empty_fields() {
        assert_eq!(Reply::done().line(), "{\"ok\":true}\n");
        assert_eq!(
            Reply::refused("a\nb").line(),
            "{\"ok\":false,\"error\":\"a\\nb\"}\n"
        );
    }

    #[test]
    fn a_status_from_a_newer_worker_is_still_read() {
        let reply: Reply =
            serde_json::from_str(r#"{"ok":true,"status":{"name":"a","colour":"red"}}"#).unwrap();
        assert_eq!(reply.status.unwrap().name, "a");
    }

    #[test]
    fn the_client_reads_replies_and_console_bytes_behind_them() {
        let (a, mut b) = UnixStream::pair().unwrap();
        b.write_all(b"{\"ok\":true}\nhello").unwrap();
        let client = Client {
            stream: BufReader::new(a),
        };
        let (_, early) = client.into_console().unwrap();
        assert_eq!(early, b"hello");
    }
}
