//! The same call again, beside somebody who uses up the memory's bandwidth at random moments: the same bits.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use super::device::Device;
use super::repeats;
use crate::common::rng::Rng;

/// `count` repeats of each shape; how often the hog ran is printed, as without it nothing was perturbed.
pub(crate) fn run(device: &Device, count: usize, seed: u64) -> bool {
    let (stop, bursts) = (AtomicBool::new(false), AtomicU64::new(0));
    let right = std::thread::scope(|scope| {
        scope.spawn(|| hog(device, seed, (&stop, &bursts)));
        let right = repeats::run(device, count);
        stop.store(true, Ordering::Relaxed);
        right
    });
    let bursts = bursts.into_inner();
    println!("  {bursts} bursts of a hog beside {count} repeats of each shape");
    right && bursts > 0
}

/// Copies of random length at random times, on a stream that waits for nobody.
fn hog(device: &Device, seed: u64, (stop, bursts): (&AtomicBool, &AtomicU64)) {
    device.enter();
    let mut rng = Rng::new(seed);
    let most: usize = if device.cuda.is_some() { 1 << 30 } else { 1 << 22 };
    let (from, to) = (device.allocate(most), device.allocate(most));
    let stream = device.cuda.as_ref().map(|cuda| cuda.free_stream());
    while !stop.load(Ordering::Relaxed) {
        let bytes = most >> rng.below(8);
        for _ in 0..rng.within(1, 8) {
            device.copy(to, from, bytes, stream);
        }
        if let (Some(cuda), Some(stream)) = (&device.cuda, stream) {
            cuda.sync_stream(stream);
        }
        bursts.fetch_add(1, Ordering::Relaxed);
        std::thread::sleep(Duration::from_micros(rng.below(500) as u64));
    }
    device.release(from, most);
    device.release(to, most);
}
