//! `strftime_now`: the date that some templates write, in C's format codes.

use time::OffsetDateTime;

const DAYS: [&str; 7] = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"];

/// The local time, or UTC where the machine doesn't say what local is.
pub(super) fn now() -> OffsetDateTime {
    OffsetDateTime::now_local().unwrap_or_else(|_| OffsetDateTime::now_utc())
}

/// `time` written by `format`; codes that aren't known stay as they are, as in C.
pub(super) fn strftime(time: OffsetDateTime, format: &str) -> String {
    let mut out = String::new();
    let mut characters = format.chars();
    while let Some(character) = characters.next() {
        if character != '%' {
            out.push(character);
            continue;
        }
        let rest = characters.as_str();
        // glibc's `%-d`: no padding
        let padded = !rest.starts_with('-');
        if !padded {
            characters.next();
        }
        match characters.next().and_then(|code| field(time, code, padded)) {
            Some(text) => out.push_str(&text),
            None => {
                let taken = rest.len() - characters.as_str().len();
                out.push('%');
                out.push_str(&rest[..taken]);
            }
        }
    }
    out
}

fn field(time: OffsetDateTime, code: char, padded: bool) -> Option<String> {
    let month = time.month().to_string();
    let day = DAYS[usize::from(time.weekday().number_days_from_monday())];
    let hour12 = (time.hour() + 11) % 12 + 1;
    let number = |value: u32, width: usize| {
        if padded { format!("{value:0width$}") } else { value.to_string() }
    };
    Some(match code {
        'Y' => time.year().to_string(),
        'y' => number(time.year().rem_euclid(100).unsigned_abs(), 2),
        'm' => number(u8::from(time.month()).into(), 2),
        'd' => number(time.day().into(), 2),
        'e' => format!("{:>2}", time.day()),
        'j' => number(time.ordinal().into(), 3),
        'H' => number(time.hour().into(), 2),
        'I' => number(hour12.into(), 2),
        'M' => number(time.minute().into(), 2),
        'S' => number(time.second().into(), 2),
        'f' => format!("{:06}", time.microsecond()),
        'p' => if time.hour() < 12 { "AM" } else { "PM" }.to_owned(),
        'B' => month,
        'b' | 'h' => month.chars().take(3).collect(),
        'A' => day.to_owned(),
        'a' => day.chars().take(3).collect(),
        'u' => time.weekday().number_from_monday().to_string(),
        'w' => time.weekday().number_days_from_sunday().to_string(),
        'F' => format!("{}-{}-{}", time.year(), number(u8::from(time.month()).into(), 2), number(time.day().into(), 2)),
        'T' => format!("{:02}:{:02}:{:02}", time.hour(), time.minute(), time.second()),
        'D' => {
            format!("{:02}/{:02}/{:02}", u8::from(time.month()), time.day(), time.year().rem_euclid(100))
        }
        'n' => "\n".to_owned(),
        't' => "\t".to_owned(),
        '%' => "%".to_owned(),
        _ => return None,
    })
}
