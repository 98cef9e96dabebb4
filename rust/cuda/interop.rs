//! For engines that drive the GPU through cudarc: their streams in our calls.

use cudarc::driver::CudaStream;

use super::plan::Call;

impl Call<'_> {
    /// The same call on the engine's stream, which lives on the GPU's primary context as ours does.
    #[must_use]
    pub fn on(self, stream: &CudaStream) -> Self {
        Self { stream: stream.cu_stream().cast(), ..self }
    }
}
