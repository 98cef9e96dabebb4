//! `stats --serve`: a metrics exporter, one scrape at a time. It reads files and nothing else, so an engine cannot notice it.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::time::Duration;

use compactattn::{Error, Status};

use crate::{Outcome, prometheus, stats};

/// Answers until the process is ended.
///
/// # Errors
/// [`Status::Io`] if the address cannot be had; those of `out`.
pub(crate) fn serve(address: SocketAddr, files: &[PathBuf], out: &mut impl Write) -> Outcome {
    let taken = |e| Error::new(Status::Io, "--serve", "an address that is free", format!("{address}: {e}"));
    let listener = TcpListener::bind(address).map_err(taken)?;
    writeln!(out, "serving http://{}/metrics", listener.local_addr()?)?;
    out.flush()?;
    for stream in listener.incoming() {
        // A scraper that goes away, or none at all, is no reason to stop.
        if let Err(error) = stream.and_then(|stream| answer(stream, files)) {
            tracing::debug!(%error, "a scrape failed");
        }
    }
    Ok(())
}

fn answer(mut stream: TcpStream, files: &[PathBuf]) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut request = String::new();
    let mut reader = BufReader::new((&stream).take(LONGEST_REQUEST));
    reader.read_line(&mut request)?;
    // The rest is read too: closing with bytes unread resets the connection, and the answer with it.
    let mut header = String::new();
    while reader.read_line(&mut header)? > 2 {
        header.clear();
    }
    let (code, text) = respond(&request, files);
    let length = text.len();
    let head = format!("HTTP/1.1 {code}\r\nContent-Type: {KIND}\r\nContent-Length: {length}\r\n");
    stream.write_all(format!("{head}Connection: close\r\n\r\n{text}").as_bytes())
}

/// Status line and body for a request's first line.
fn respond(request: &str, files: &[PathBuf]) -> (&'static str, String) {
    match request.split_whitespace().collect::<Vec<_>>()[..] {
        ["GET", "/metrics" | "/", _] => match stats::read_all(files) {
            Ok(all) => ("200 OK", prometheus::text(&all)),
            Err(error) => ("503 Service Unavailable", format!("{error}\n")),
        },
        ["GET", _, _] => ("404 Not Found", "only /metrics is here\n".to_owned()),
        _ => ("400 Bad Request", "wanted GET /metrics\n".to_owned()),
    }
}

const KIND: &str = "text/plain; version=0.0.4; charset=utf-8";
const PATIENCE: Duration = Duration::from_secs(5);
const LONGEST_REQUEST: u64 = 8192;

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    #[test]
    fn a_scrape_gets_metrics_and_everything_else_a_reason() {
        let file = std::env::temp_dir().join(format!("compactattn_exporter_{}.json", std::process::id()));
        std::fs::write(&file, r#"{"pid": 7, "split_steps": 12}"#).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let files = vec![file.clone()];
        let server = thread::spawn(move || {
            for stream in listener.incoming().take(4) {
                answer(stream.unwrap(), &files).unwrap();
            }
        });
        let ask = |line: &str| {
            let mut stream = TcpStream::connect(address).unwrap();
            stream.write_all(format!("{line}\r\nHost: here\r\n\r\n").as_bytes()).unwrap();
            let mut text = String::new();
            stream.read_to_string(&mut text).unwrap();
            text
        };
        let scraped = ask("GET /metrics HTTP/1.1");
        assert!(scraped.starts_with("HTTP/1.1 200 OK\r\n"), "{scraped}");
        assert!(scraped.contains("\ncompactattn_split_steps_total{pid=\"7\"} 12\n"), "{scraped}");
        assert!(ask("GET /secrets HTTP/1.1").starts_with("HTTP/1.1 404"));
        assert!(ask("POST /metrics HTTP/1.1").starts_with("HTTP/1.1 400"));
        std::fs::remove_file(&file).unwrap();
        assert!(ask("GET /metrics HTTP/1.1").starts_with("HTTP/1.1 503"));
        server.join().unwrap();
    }
}
