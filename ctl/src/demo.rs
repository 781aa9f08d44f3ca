//! placeholder
use anyhow::Result;
use crate::args::Demo;
pub fn run(_options: Demo) -> Result<()> { Ok(()) }
