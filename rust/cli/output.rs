//! Files the tool writes.

use std::collections::HashMap;
use std::path::Path;

use compactattn::{Error, Result, Status};
use safetensors::tensor::TensorView;
use serde_json::Value;

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
    let mut bytes =
        safetensors::serialize(views.collect::<Result<Vec<_>>>()?, Some(metadata)).map_err(broken)?;
    sort_header(&mut bytes);
    write_file(path, &bytes)
}

/// Puts the header's names in order, as those of metadata come from a hash map: the same tensors make the same bytes.
fn sort_header(bytes: &mut [u8]) {
    let Some((length, rest)) = bytes.split_first_chunk_mut() else { return };
    let length = usize::try_from(u64::from_le_bytes(*length)).unwrap_or(usize::MAX);
    let Some(header) = rest.get_mut(..length) else { return };
    let Ok(mut sorted) = serde_json::from_slice::<Value>(header).map(|value| value.to_string().into_bytes())
    else {
        return;
    };
    // Spaces that align the tensors stay at the end.
    sorted.resize(sorted.len().max(length), b' ');
    if sorted.len() == length {
        header.copy_from_slice(&sorted);
    }
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
