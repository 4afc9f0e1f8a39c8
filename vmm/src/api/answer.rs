//! Answers as HTTP: JSON for everything that can be said in it, `{error, remedy}` for what failed.

use axum::Json;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};

use super::control::{Reason, Refused};

/// The body of every answer that is not a success.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// What is wrong.
    pub error: String,
    /// What to do about it.
    pub remedy: String,
}

/// An answer that is not a success.
#[derive(Debug)]
pub(super) struct Failure {
    status: StatusCode,
    body: ErrorBody,
}

impl Failure {
    pub(super) fn new(
        status: StatusCode,
        error: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self {
            status,
            body: ErrorBody {
                error: error.into(),
                remedy: remedy.into(),
            },
        }
    }
}

impl From<Refused> for Failure {
    fn from(refused: Refused) -> Self {
        let status = match refused.reason {
            Reason::Invalid => StatusCode::BAD_REQUEST,
            Reason::Conflict => StatusCode::CONFLICT,
            Reason::Busy => StatusCode::SERVICE_UNAVAILABLE,
            Reason::Failed => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self::new(status, refused.error, refused.remedy)
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        (self.status, Json(self.body)).into_response()
    }
}

/// A text of this media type.
pub(super) fn text(media_type: &'static str, text: impl Into<String>) -> Response {
    ([(header::CONTENT_TYPE, media_type)], text.into()).into_response()
}
