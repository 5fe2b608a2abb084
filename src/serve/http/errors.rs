//! Errors, in the shape that each API's clients read.

use std::time::Duration;

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::serve::{Refusal, Refused};
use crate::{Error, ErrorKind};

/// An answer that is an error.
#[derive(Clone, Debug)]
pub(super) struct ApiError {
    status: StatusCode,
    kind: &'static str,
    code: Option<String>,
    param: Option<String>,
    message: String,
    /// In how many seconds one may try again, for 429 and 503.
    retry: u64,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, code: Option<&'static str>, message: impl Into<String>) -> Self {
        Self { status, kind, code: code.map(str::to_owned), param: None, message: message.into(), retry: 1 }
    }

    /// 400: the request as a whole.
    pub fn request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", None, message)
    }

    /// 400: one field, with what it must be and what it is.
    pub fn field(name: &str, expected: &str, got: &str) -> Self {
        let error = Self::request(format!("{name}: expected {expected}, got {got}"));
        Self { param: Some(name.to_owned()), code: Some("invalid_value".to_owned()), ..error }
    }

    /// 400: a field of the API that this server does not have.
    pub fn unsupported(name: &str, message: impl Into<String>) -> Self {
        let error = Self::request(message);
        Self { param: Some(name.to_owned()), code: Some("unsupported_value".to_owned()), ..error }
    }

    /// 400: a field that the API does not have.
    pub fn unknown(name: &str) -> Self {
        let error = Self::request(format!("expected fields of the API, got {:?}", shortened(name)));
        Self { param: Some(shortened(name)), code: Some("unknown_parameter".to_owned()), ..error }
    }

    /// 401.
    pub fn unauthorized() -> Self {
        let message = "expected this server's api key in the header `Authorization: Bearer …`, got none or another";
        Self::new(StatusCode::UNAUTHORIZED, "authentication_error", Some("invalid_api_key"), message)
    }

    /// 403: a request that a page of another site made a browser send.
    pub fn forbidden(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, "permission_error", None, message)
    }

    /// 429: this key has had what it may have.
    pub fn limited(wait: Duration, what: &str) -> Self {
        let seconds = (wait.as_secs_f64().ceil() as u64).max(1);
        let message = format!("expected fewer {what} a minute with this key, got one more; try again in {seconds} s");
        let code = Some("rate_limit_exceeded");
        Self { retry: seconds, ..Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", code, message) }
    }

    /// 429: too many at the same time.
    pub fn busy(seconds: u64, message: &str) -> Self {
        Self { retry: seconds, ..Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", None, message) }
    }

    /// 400: a file with rows that cannot be trained on.
    pub fn invalid_file(message: String) -> Self {
        let error = Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", Some("invalid_file_format"), message);
        Self { param: Some("file".to_owned()), ..error }
    }

    /// Any status.
    pub fn of_status(status: u16, message: impl Into<String>) -> Self {
        let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let kind = if status.is_server_error() { "server_error" } else { "invalid_request_error" };
        Self::new(status, kind, None, message)
    }

    /// 404: no such route.
    pub fn no_route(path: &str) -> Self {
        let message = format!("expected a route of this server, got {}", shortened(path));
        Self::new(StatusCode::NOT_FOUND, "invalid_request_error", Some("unknown_url"), message)
    }

    /// 404: no such model.
    pub fn no_model(name: &str, known: &str) -> Self {
        let message = format!("model: expected one of {known}, got {:?}", shortened(name));
        let error = Self::new(StatusCode::NOT_FOUND, "invalid_request_error", Some("model_not_found"), message);
        Self { param: Some("model".to_owned()), ..error }
    }

    /// 405.
    pub fn method() -> Self {
        let message = "expected another method for this route";
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "invalid_request_error", Some("method_not_allowed"), message)
    }

    /// 408: the body did not come.
    pub fn slow(seconds: u64) -> Self {
        let message = format!("body: expected all of it within {seconds} seconds");
        Self::new(StatusCode::REQUEST_TIMEOUT, "invalid_request_error", None, message)
    }

    /// 413.
    pub fn too_large(limit: usize) -> Self {
        let message = format!("body: expected at most {limit} bytes, got more");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error", None, message)
    }

    /// 500.
    pub fn server(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", None, message)
    }

    /// 503.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", None, message)
    }

    /// The body in the words of the API that a route belongs to.
    fn body(&self, path: &str) -> Value {
        if path.starts_with("/v1/messages") {
            self.anthropic()
        } else if path.starts_with("/api/") {
            self.ollama()
        } else {
            self.json()
        }
    }

    /// The body for Anthropic's clients.
    pub fn anthropic(&self) -> Value {
        let kind = match self.status.as_u16() {
            400 | 405 | 408 => "invalid_request_error",
            401 => "authentication_error",
            403 => "permission_error",
            404 => "not_found_error",
            413 => "request_too_large",
            429 => "rate_limit_error",
            503 => "overloaded_error",
            _ => "api_error",
        };
        json!({"type": "error", "error": {"type": kind, "message": self.message}})
    }

    /// The body for Ollama's clients.
    pub fn ollama(&self) -> Value {
        json!({"error": self.message})
    }

    /// The body for OpenAI's clients.
    pub fn json(&self) -> Value {
        json!({"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}})
    }
}

/// Names that a client chose are cut in messages.
fn shortened(text: &str) -> String {
    text.chars().take(100).collect()
}

impl From<Error> for ApiError {
    fn from(error: Error) -> Self {
        match error.kind {
            ErrorKind::Failure => return Self::server(error.message),
            ErrorKind::Busy => return Self::unavailable(error.message),
            ErrorKind::Input => {}
        }
        let mut api = Self::request(error.to_string().replace('\n', "; "));
        // The core's messages begin with the field's name.
        let name = error.message.split_once(':').map(|(name, _)| name);
        api.param = name.filter(|name| name.chars().all(|c| c.is_ascii_lowercase() || c == '_')).map(str::to_owned);
        if api.message.starts_with("prompt: expected fewer than") {
            api.code = Some("context_length_exceeded".to_owned());
        }
        api
    }
}

impl From<Refused> for ApiError {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::Full { retry_after, .. } => {
                let message = Error::from(refused).message;
                let error = Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", Some("queue_full"), message);
                Self { retry: retry_after, ..error }
            }
            Refused::Stopped => Self::unavailable("the server is shutting down"),
            Refused::Invalid(error) => error.into(),
        }
    }
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> Self {
        let Refusal { status, message, param, code } = refusal;
        Self { param, code, ..Self::of_status(status, message) }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = self.answer(self.json());
        // The guard knows the route, and may say it in other words.
        response.extensions_mut().insert(self);
        response
    }
}

impl ApiError {
    /// A response that is an error, in the words of its route.
    pub fn worded(response: Response, path: &str) -> Response {
        match response.extensions().get::<Self>() {
            Some(error) => error.answer(error.body(path)),
            None => response,
        }
    }

    fn answer(&self, body: Value) -> Response {
        let mut response = (self.status, axum::Json(body)).into_response();
        let headers = response.headers_mut();
        if matches!(self.status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(self.retry));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}
