//! Who may ask: the checks before any route.
//!
//! A server on loopback is reachable by every page in the user's browser: by a form that posts to it, or by a name that
//! is made to resolve to 127.0.0.1. So on loopback the `Host` must be a loopback name, and a request that says which page
//! it comes from (`Origin`) must come from this server's own. No header ever allows another site (no CORS).

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, header, uri::Authority};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::App;
use super::errors::ApiError;
use super::keys::Key;
use super::log::Record;
use super::meter::Caller;
use super::page;

/// Routes that need no key, besides the page itself, which then asks for it.
const OPEN: [&str; 3] = ["/health", "/ready", "/openapi.json"];
/// Where a key that manages is needed; reading the first two needs any key.
const MANAGED: [&str; 5] = ["/v1/adapters", "/v1/aliases", "/v1/files", "/v1/fine_tuning", "/metrics"];

const API_KEY: HeaderName = HeaderName::from_static("x-api-key");
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Where Anthropic's clients look for the same.
const THEIR_REQUEST_ID: HeaderName = HeaderName::from_static("request-id");

/// Checks a request, passes it on, counts the answer.
pub(super) async fn guard(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let path = request.uri().path().to_owned();
    let id = format!("req_{:032x}", rand::random::<u128>());
    let record = Arc::new(Record::new(app.log.as_ref(), id, request.method().as_str(), &path));
    let response = match check(&app, &request) {
        Ok(key) => {
            record.key(&key.name);
            request.extensions_mut().insert(Caller { key, record: Arc::clone(&record) });
            next.run(request).await
        }
        Err(error) => error.into_response(),
    };
    let mut response = ApiError::worded(response, &path);
    record.status(response.status().as_u16());
    if let Ok(id) = HeaderValue::from_str(&record.id) {
        if path.starts_with("/v1/messages") {
            response.headers_mut().insert(THEIR_REQUEST_ID, id.clone());
        }
        response.headers_mut().insert(REQUEST_ID, id);
    }
    let nosniff = HeaderValue::from_static("nosniff");
    response.headers_mut().insert(HeaderName::from_static("x-content-type-options"), nosniff);
    app.engine.metrics().answered(response.status().as_u16());
    response
}

/// Who asks, if he may.
fn check(app: &App, request: &Request) -> Result<Arc<Key>, ApiError> {
    let headers = request.headers();
    let host = host(request);
    if app.settings.loopback {
        let name = host.as_ref().map_or("", Authority::host);
        if !is_loopback(name) && name != app.settings.host {
            return Err(ApiError::forbidden(format!("host: expected a name of this machine, got {name:?}")));
        }
    }
    if let Some(origin) = single(headers, &header::ORIGIN)? {
        let own = host.as_ref().is_some_and(|host| {
            let rest = origin.strip_prefix("http://").or_else(|| origin.strip_prefix("https://"));
            rest.is_some_and(|rest| rest.eq_ignore_ascii_case(host.as_str()))
        });
        if !own {
            return Err(ApiError::forbidden("origin: expected this server's own page, got another"));
        }
    }
    let path = request.uri().path();
    let managed = MANAGED
        .iter()
        .position(|room| path.strip_prefix(room).is_some_and(|rest| rest.is_empty() || rest.starts_with('/')));
    let managed = managed.is_some_and(|room| room > 1 || request.method() != Method::GET);
    if app.keys.is_empty() || OPEN.contains(&path) || page::has(path) {
        // Without keys, whoever reaches this machine may ask; only whoever sits at it may manage.
        if managed && !app.anonymous.admin && path != "/metrics" {
            return Err(ApiError::forbidden(
                "expected a server with keys, since other machines can reach it; start it with --api-key",
            ));
        }
        return Ok(Arc::clone(&app.anonymous));
    }
    // Anthropic's clients have a header of their own.
    let own = if path.starts_with("/v1/messages") { single(headers, &API_KEY)? } else { None };
    let given = single(headers, &header::AUTHORIZATION)?.unwrap_or_default();
    let (scheme, token) = own.map_or_else(|| given.split_once(' ').unwrap_or_default(), |key| ("bearer", key));
    let Some(key) = app.keys.find(token.trim()).filter(|_| scheme.eq_ignore_ascii_case("bearer")) else {
        return Err(ApiError::unauthorized());
    };
    if managed && !key.admin {
        return Err(ApiError::forbidden(format!("expected a key that may manage, got {}", key.name)));
    }
    key.request().map_err(|wait| {
        app.traffic.limited.add(1);
        ApiError::limited(wait, "requests")
    })?;
    Ok(key)
}

/// The server's name as the client calls it.
fn host(request: &Request) -> Option<Authority> {
    if let Some(authority) = request.uri().authority() {
        return Some(authority.clone());
    }
    single(request.headers(), &header::HOST).ok().flatten()?.parse().ok()
}

/// A header that may come once only: two could be read differently by two readers.
fn single<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Result<Option<&'a str>, ApiError> {
    let mut values = headers.get_all(name).iter();
    let (first, second) = (values.next(), values.next());
    match (first.map(HeaderValue::to_str), second) {
        (None, _) => Ok(None),
        (Some(Ok(value)), None) => Ok(Some(value)),
        _ => Err(ApiError::request(format!("{name}: expected one value in ASCII"))),
    }
}

fn is_loopback(name: &str) -> bool {
    let bare = name.trim_start_matches('[').trim_end_matches(']');
    name.eq_ignore_ascii_case("localhost")
        || bare.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_this_machine() {
        for name in ["localhost", "LOCALHOST", "127.0.0.1", "127.8.8.8", "[::1]"] {
            assert!(is_loopback(name), "{name}");
        }
        for name in ["", "localhost.evil.example", "127.0.0.1.evil.example", "0.0.0.0", "10.0.0.1", "evil.example"] {
            assert!(!is_loopback(name), "{name}");
        }
    }
}
