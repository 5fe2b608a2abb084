//! The one error type of the core: what went wrong, whose fault it is, and what to do about it.

use std::fmt;

/// Whose fault an error is; the command line turns it into an exit code, the server into a status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The user's input cannot be used: exit code 2, HTTP 4xx.
    Input,
    /// Something failed on our side or the machine's: exit code 1, HTTP 5xx.
    Failure,
    /// It can't be done now, and later perhaps: exit code 1, HTTP 503.
    Busy,
}

/// An error with a message for people and, where one is known, a hint at the remedy.
#[derive(Clone, Debug)]
pub struct Error {
    /// Whose fault it is.
    pub kind: ErrorKind,
    /// What went wrong, in lower case, with the expected and the actual value.
    pub message: String,
    /// What the user can do about it.
    pub hint: Option<String>,
}

/// The core's result type.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error in what the user gave us.
    pub fn input(message: impl Into<String>) -> Self {
        Self { kind: ErrorKind::Input, message: message.into(), hint: None }
    }

    /// A failure that is not the user's fault.
    pub fn failure(message: impl Into<String>) -> Self {
        Self { kind: ErrorKind::Failure, message: message.into(), hint: None }
    }

    /// What can't be done now.
    pub fn busy(message: impl Into<String>) -> Self {
        Self { kind: ErrorKind::Busy, message: message.into(), hint: None }
    }

    /// The same error with a hint at the remedy.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// An input/output error about one file.
    pub fn io(path: &std::path::Path, error: &std::io::Error) -> Self {
        use std::io::ErrorKind as Io;
        let (name, text) = (path.display(), error.to_string());
        let said = text.split(" (os error").next().unwrap_or_default().to_lowercase();
        match error.kind() {
            Io::StorageFull | Io::QuotaExceeded | Io::FileTooLarge => {
                Self::input(format!("{name}: expected room for this file, got: {said}"))
                    .hint("make room and try again; nothing half-written stays")
            }
            Io::PermissionDenied
            | Io::ReadOnlyFilesystem
            | Io::IsADirectory
            | Io::NotADirectory
            | Io::AlreadyExists
            | Io::InvalidFilename => {
                Self::input(format!("{name}: expected a place that can be read and written, got: {said}"))
            }
            Io::NotFound | Io::InvalidData => Self::input(format!("{name}: {said}")),
            _ => Self::failure(format!("{name}: {said}")),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        if let Some(hint) = &self.hint {
            write!(f, "\nhint: {hint}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {}
