//! Connections: bound before anything else, limited in number and time, drained at the end.

use std::net::{IpAddr, SocketAddr, TcpListener, ToSocketAddrs};
use std::sync::Arc;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::sync::{Semaphore, watch};

use super::patient::Patient;
use crate::{Error, Result};

/// Most connections at the same time; more wait in the kernel's queue.
const CONNECTIONS: u32 = 1024;
/// A request's head must come within this time, also on a connection that is kept.
const HEAD: Duration = Duration::from_secs(30);
/// A client must read something of its answer within this time.
const WRITE: Duration = Duration::from_secs(60);
/// Most bytes of a request's head.
const HEAD_BYTES: usize = 64 * 1024;
/// Answers under way at the end may take this long.
const DRAIN: Duration = Duration::from_secs(30);

/// Takes the port, so that a wrong address is known before a model is loaded.
pub fn bind(host: &str, port: u16) -> Result<TcpListener> {
    let failed = |error: &std::io::Error| {
        let message = format!("{host}:{port}: {error}");
        match error.kind() {
            std::io::ErrorKind::AddrInUse => {
                Error::input(format!("{host}:{port}: expected a free port, got one in use"))
                    .hint("choose another with --port, or 0 for any free one")
            }
            std::io::ErrorKind::PermissionDenied => {
                Error::input(message).hint("ports below 1024 need rights; try --port 8000")
            }
            _ => Error::input(message).hint("expected an address of this machine, such as 127.0.0.1 or 0.0.0.0"),
        }
    };
    let addresses: Vec<SocketAddr> = (host, port).to_socket_addrs().map_err(|error| failed(&error))?.collect();
    let listener = TcpListener::bind(addresses.as_slice()).map_err(|error| failed(&error))?;
    listener.set_nonblocking(true).map_err(|error| failed(&error))?;
    Ok(listener)
}

/// The URL that a listener is reached at from this machine.
pub fn url(listener: &TcpListener) -> Result<String> {
    let address = listener.local_addr().map_err(|error| Error::failure(format!("the listener: {error}")))?;
    let host = match address.ip() {
        ip if ip.is_unspecified() => "127.0.0.1".to_owned(),
        IpAddr::V6(ip) => format!("[{ip}]"),
        IpAddr::V4(ip) => ip.to_string(),
    };
    Ok(format!("http://{host}:{}", address.port()))
}

/// Serves until `stop` says so, then lets answers under way finish; when `stop` says so again, drops them.
pub(super) async fn serve(listener: TcpListener, router: axum::Router, mut stop: watch::Receiver<u32>) -> Result<()> {
    let listener = tokio::net::TcpListener::from_std(listener)
        .map_err(|error| Error::failure(format!("the listener: {error}")))?;
    let room = Arc::new(Semaphore::new(CONNECTIONS as usize));
    let mut tasks = tokio::task::JoinSet::new();
    while *stop.borrow_and_update() == 0 {
        // The semaphore is never closed.
        let Ok(place) = Arc::clone(&room).acquire_owned().await else { break };
        let stream = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = stop.changed() => break,
        };
        while tasks.try_join_next().is_some() {}
        let Ok((stream, _)) = stream else {
            // Out of file descriptors, most likely: some will come back.
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let _ = stream.set_nodelay(true);
        let (service, mut stop) = (TowerToHyperService::new(router.clone()), stop.clone());
        tasks.spawn(async move {
            let _place = place;
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD)
                .max_buf_size(HEAD_BYTES)
                .serve_connection(TokioIo::new(Patient::new(stream, WRITE)), service);
            tokio::pin!(connection);
            // A broken connection is the client's matter.
            tokio::select! {
                _ = connection.as_mut() => {}
                _ = stop.changed() => {
                    connection.as_mut().graceful_shutdown();
                    let _ = connection.await;
                }
            }
        });
    }
    drop(listener);
    tokio::select! {
        () = async { while tasks.join_next().await.is_some() {} } => {}
        () = tokio::time::sleep(DRAIN) => {}
        () = async { while *stop.borrow_and_update() < 2 && stop.changed().await.is_ok() {} } => {}
    }
    tasks.shutdown().await;
    Ok(())
}
