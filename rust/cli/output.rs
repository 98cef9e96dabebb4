//! Files the tool writes.

use std::collections::HashMap;
use std::path::Path;

use compactattn::{Error, Result, Status};
use safetensors::tensor::TensorView;

use crate::trace::Data;

/// Writes named tensors of given extents as one safetensors file.
///
/// # Errors
/// [`Status::Io`].
pub(crate) fn write_tensors<'a>(
    path: &Path,
    tensors: impl Iterator<Item = (String, Vec<usize>, &'a Data)>,
    metadata: HashMap<String, String>,
) -> Result<()> {
    let broken = |e| Error::plain(Status::Internal, format!("cannot serialise: {e}"));
    let views = tensors.map(|(name, dims, data)| {
        let (dtype, bytes) = data.bytes();
        Ok((name, TensorView::new(dtype, dims, bytes).map_err(broken)?))
    });
    let bytes = safetensors::serialize(views.collect::<Result<Vec<_>>>()?, Some(metadata)).map_err(broken)?;
    write_file(path, &bytes)
}

/// Writes a whole file, its folder made where missing.
///
/// # Errors
/// [`Status::Io`].
pub(crate) fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let made = folder.map_or(Ok(()), std::fs::create_dir_all);
    made.and_then(|()| std::fs::write(path, bytes))
        .map_err(|e| Error::plain(Status::Io, format!("cannot write {}: {e}", path.display())))
}
