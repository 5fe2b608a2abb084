//! Forms with files: `multipart/form-data`, as bytes that lie before us (RFC 7578, RFC 2046).

/// Most parts of a form.
const PARTS: usize = 32;
/// Most bytes of a part's head.
const HEAD: usize = 8 * 1024;

/// One part of a form.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Part<'a> {
    /// The field's name.
    pub name: String,
    /// The file's name, if it is one: what the client calls it, and never a path of ours.
    pub filename: Option<String>,
    /// What it holds.
    pub content: &'a [u8],
}

/// The boundary that a content type names.
pub(super) fn boundary(content_type: &str) -> Option<String> {
    let (kind, rest) = content_type.split_once(';')?;
    if !kind.trim().eq_ignore_ascii_case("multipart/form-data") {
        return None;
    }
    let boundary = parameters(rest).into_iter().find(|(name, _)| name == "boundary")?.1;
    ((1..=70).contains(&boundary.len()) && boundary.bytes().all(|byte| byte.is_ascii_graphic())).then_some(boundary)
}

/// The parts of a form. An error says what was expected.
pub(super) fn parts<'a>(body: &'a [u8], boundary: &str) -> Result<Vec<Part<'a>>, &'static str> {
    let first = format!("--{boundary}");
    let between = format!("\r\n--{boundary}");
    let mut rest = match body.strip_prefix(first.as_bytes()) {
        Some(rest) => rest,
        // What stands before the first boundary is not ours to read.
        None => &body[find(body, between.as_bytes()).ok_or("a boundary")? + between.len()..],
    };
    let mut parts = Vec::new();
    loop {
        if rest.starts_with(b"--") {
            return Ok(parts);
        }
        rest = rest.strip_prefix(b"\r\n").ok_or("a line break after a boundary")?;
        if parts.len() == PARTS {
            return Err("at most 32 parts");
        }
        let window = &rest[..rest.len().min(HEAD)];
        let end = find(window, b"\r\n\r\n").ok_or("a part's head of at most 8 KiB")?;
        let (name, filename) = head(&rest[..end])?;
        rest = &rest[end + 4..];
        let end = find(rest, between.as_bytes()).ok_or("a boundary at the end")?;
        parts.push(Part { name, filename, content: &rest[..end] });
        rest = &rest[end + between.len()..];
    }
}

/// The names in a part's head.
fn head(head: &[u8]) -> Result<(String, Option<String>), &'static str> {
    let head = std::str::from_utf8(head).map_err(|_| "a part's head in UTF-8")?;
    let mut names = None;
    for line in head.split("\r\n") {
        let (field, value) = line.split_once(':').ok_or("headers in a part's head")?;
        if field.trim().eq_ignore_ascii_case("content-disposition") {
            let (kind, rest) = value.split_once(';').ok_or("a part's name")?;
            if !kind.trim().eq_ignore_ascii_case("form-data") || names.is_some() {
                return Err("one disposition, form-data");
            }
            names = Some(parameters(rest));
        }
    }
    let names = names.ok_or("a part's disposition")?;
    let of = |wanted: &str| names.iter().find(|(name, _)| name == wanted).map(|(_, value)| value.clone());
    Ok((of("name").ok_or("a part's name")?, of("filename")))
}

/// `; name=value; name="value"`, names in lower case.
fn parameters(text: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut rest = text;
    while let Some((name, after)) = rest.split_once('=') {
        let name = name.trim_matches(|c: char| c == ';' || c.is_whitespace()).to_ascii_lowercase();
        let after = after.trim_start();
        let value = if let Some(quoted) = after.strip_prefix('"') {
            let mut value = String::new();
            let mut letters = quoted.char_indices();
            let mut end = quoted.len();
            while let Some((at, letter)) = letters.next() {
                match letter {
                    '"' => {
                        end = at + 1;
                        break;
                    }
                    // Browsers write a quote as %22 and leave a backslash alone; others escape with it.
                    '\\' if quoted[at + 1..].starts_with(['"', '\\']) => {
                        value.extend(letters.next().map(|(_, next)| next))
                    }
                    letter => value.push(letter),
                }
            }
            rest = &quoted[end..];
            value
        } else {
            let (value, left) = after.split_once(';').unwrap_or((after, ""));
            rest = left;
            value.trim().to_owned()
        };
        found.push((name, value));
    }
    found
}

/// Where `wanted` begins.
fn find(bytes: &[u8], wanted: &[u8]) -> Option<usize> {
    let mut from = 0;
    while let Some(at) = bytes[from..].iter().position(|&byte| byte == wanted[0]) {
        if bytes[from + at..].starts_with(wanted) {
            return Some(from + at);
        }
        from += at + 1;
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn boundaries_are_read_from_the_content_type() {
        assert_eq!(boundary("multipart/form-data; boundary=abc").as_deref(), Some("abc"));
        assert_eq!(boundary("Multipart/Form-Data; charset=x; Boundary=\"a b\""), None);
        assert_eq!(boundary("multipart/form-data; boundary=\"a'b\"").as_deref(), Some("a'b"));
        for bad in ["multipart/form-data", "multipart/mixed; boundary=a", "multipart/form-data; boundary=", ""] {
            assert_eq!(boundary(bad), None, "{bad}");
        }
    }

    proptest! {
        /// What a client writes is what is read, whatever the bytes are.
        #[test]
        fn forms_come_back(
            fields in prop::collection::vec(("[a-z]{1,8}", prop::option::of("[a-z.\\\\\" ]{0,12}"), prop::collection::vec(any::<u8>(), 0..80)), 0..5),
        ) {
            let mut body = Vec::new();
            for (name, filename, content) in &fields {
                body.extend_from_slice(format!("--XyZ\r\nContent-Disposition: form-data; name=\"{name}\"").as_bytes());
                if let Some(filename) = filename {
                    let escaped = filename.replace('\\', "\\\\").replace('"', "\\\"");
                    body.extend_from_slice(format!("; filename=\"{escaped}\"\r\nContent-Type: text/plain").as_bytes());
                }
                body.extend_from_slice(b"\r\n\r\n");
                body.extend_from_slice(content);
                body.extend_from_slice(b"\r\n");
            }
            body.extend_from_slice(b"--XyZ--\r\n");
            prop_assume!(fields.iter().all(|(_, _, content)| find(content, b"--XyZ").is_none()));
            let found = parts(&body, "XyZ").unwrap();
            prop_assert_eq!(found.len(), fields.len());
            for (part, (name, filename, content)) in found.iter().zip(&fields) {
                prop_assert_eq!((&part.name, &part.filename, part.content), (name, filename, content.as_slice()));
            }
        }

        #[test]
        fn any_bytes_are_read_or_refused(body in prop::collection::vec(prop::sample::select(b"-\r\n:;=\"ab\\".to_vec()), 0..200)) {
            let _ = parts(&body, "a");
            let _ = boundary(&String::from_utf8_lossy(&body));
        }
    }
}
