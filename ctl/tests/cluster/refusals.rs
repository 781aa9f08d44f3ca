//! Wrong use.
