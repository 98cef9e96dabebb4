//! Tests of loading and launching on the fake driver.

use super::*;
use crate::cuda::fake::{Fake, fatbin};

fn image(arch: &'static str) -> Image {
    let contents = "FAKE one:440; two:128,128,8;";
    Image { unit: "unit.cu", arch, kernels: &["one", "two"], fatbin: fatbin(contents) }
}

fn device(fake: &Fake) -> Arc<Device> {
    Device::open_on(fake.driver(), 0).unwrap()
}

fn status(mode: &str, images: &[Image]) -> Status {
    Kernels::load(&device(&Fake::in_mode(mode)), images).unwrap_err().status()
}

fn null_stream() -> Stream {
    // SAFETY: a special stream.
    unsafe { Stream::from_raw(std::ptr::null_mut()) }
}

const GRID: Grid = Grid { blocks: [3, 2, 1], threads: 256, shared_bytes: 200_000 };

#[test]
fn a_launch_reaches_the_driver_as_it_was_asked_for() {
    let fake = Fake::in_mode("");
    let device = device(&fake);
    let kernels = Kernels::load(&device, &[image("sm_80"), image("sm_90a")]).unwrap();
    assert!(kernels.has("one") && kernels.has("two") && !kernels.has("three"));
    let before = fake.all_calls();
    {
        let _entered = device.enter().unwrap();
        let map = [7_u64; 16];
        kernels.launch(null_stream(), "one", GRID, &[Arg::of(&[0_u8; 440])]).unwrap();
        kernels.launch(null_stream(), "two", GRID, &[Arg::of(&map), Arg::of(&map), Arg::of(&5_u64)]).unwrap();
    }
    assert_eq!(fake.all_calls() - before, 4, "push, two launches, pop");
    assert_eq!(fake.launches(), ["one 3x2x1 256 200000", "two 3x2x1 256 200000"]);
    assert_eq!(fake.number(c"fake_last_argument"), 5);
}

#[test]
fn every_kernel_is_loaded_and_opted_in_at_creation() {
    let fake = Fake::in_mode("");
    let kernels = Kernels::load(&device(&fake), &[image("sm_90a")]).unwrap();
    assert_eq!((fake.calls(c"cuModuleLoadData"), fake.calls(c"cuFuncLoad")), (1, 2));
    assert_eq!((fake.calls(c"cuFuncSetAttribute"), kernels.device.ordinal()), (2, 0));
    // The fake's kernels have 1024 bytes of static shared memory; the GPU has 232448 for both.
    assert_eq!(fake.number(c"fake_last_attribute"), 232_448 - 1024);
    drop(kernels);
    assert_eq!(fake.calls(c"cuModuleUnload"), 1);
    assert_eq!(fake.calls(c"cuDevicePrimaryCtxRelease_v2"), 1);
}

#[test]
fn an_empty_grid_is_skipped() {
    let fake = Fake::in_mode("");
    let kernels = Kernels::load(&device(&fake), &[image("sm_90a")]).unwrap();
    for blocks in [[0, 1, 1], [1, 0, 1], [1, 1, 0]] {
        kernels.launch(null_stream(), "one", Grid { blocks, ..GRID }, &[Arg::of(&[0_u8; 440])]).unwrap();
    }
    assert_eq!(fake.calls(c"cuLaunchKernelEx"), 0);
}

#[test]
fn a_launch_the_kernel_cannot_take_is_refused_before_the_driver() {
    let fake = Fake::in_mode("");
    let device = device(&fake);
    let kernels = Kernels::load(&device, &[image("sm_90a")]).unwrap();
    let _entered = device.enter().unwrap();
    let step = [0_u8; 440];
    let large = Grid { shared_bytes: 232_448, ..GRID };
    for (name, grid, args) in [
        ("three", GRID, &[Arg::of(&step)][..]),
        ("one", GRID, &[]),
        ("one", GRID, &[Arg::of(&[0_u8; 432])]),
        ("one", GRID, &[Arg::of(&step), Arg::of(&step)]),
        ("one", large, &[Arg::of(&step)]),
    ] {
        let error = kernels.launch(null_stream(), name, grid, args).unwrap_err();
        assert_eq!(error.status(), Status::Internal, "{error}");
    }
    assert_eq!(fake.calls(c"cuLaunchKernelEx"), 0);
}

#[test]
fn a_launch_that_fails_says_so_with_the_kernels_name() {
    let fake = Fake::in_mode("lost");
    let device = device(&fake);
    let kernels = Kernels::load(&device, &[image("sm_90a")]).unwrap();
    let _entered = device.enter().unwrap();
    let error = kernels.launch(null_stream(), "one", GRID, &[Arg::of(&[0_u8; 440])]).unwrap_err();
    assert_eq!(error.to_string(), "E_CONTEXT_LOST: cuLaunchKernelEx one: CUDA_ERROR_ILLEGAL_ADDRESS (700)");
}

#[test]
fn a_gpu_gets_the_images_of_its_architecture_or_none() {
    let all = || ["sm_80", "sm_90a", "sm_100a", "sm_120a"].map(image);
    for (mode, arch) in
        [("", "sm_90a"), ("cc80", "sm_80"), ("cc89", "sm_80"), ("cc100", "sm_100a"), ("cc120", "sm_120a")]
    {
        let device = device(&Fake::in_mode(mode));
        assert_eq!(choose(device.properties(), &all()), Ok(arch), "{mode}");
        assert!(Kernels::load(&device, &[image(arch)]).is_ok());
    }
    for mode in ["cc75", "cc103", "cc121", "cc110"] {
        let error = choose(device(&Fake::in_mode(mode)).properties(), &all()).unwrap_err();
        assert_eq!(error.status(), Status::Arch);
        assert!(error.to_string().contains("sm_100a, sm_120a, sm_80, sm_90a, got"), "{error}");
    }
    assert_eq!(status("", &[image("sm_80")]), Status::Arch);
    assert_eq!(status("", &[]), Status::NotBuilt);
}

#[test]
fn damaged_and_foreign_images_are_refused() {
    let with = |fatbin| [Image { fatbin, ..image("sm_90a") }];
    let whole = image("sm_90a").fatbin;
    assert_eq!(status("", &with(&whole[..whole.len() - 1])), Status::Image);
    assert_eq!(status("", &with(&whole[..6])), Status::Image);
    assert_eq!(status("", &with(b"")), Status::Image);
    assert_eq!(status("", &with(b"\x7fELF and then nothing of a section table")), Status::Image);
    assert_eq!(status("", &with(fatbin("FAKE one:440;"))), Status::Image, "a kernel is missing");
    assert_eq!(status("", &[image("sm_90a"), image("sm_90a")]), Status::Image, "kernels twice");
    assert_eq!(status("badimage", &[image("sm_90a")]), Status::Image);
    assert_eq!(status("nobinary", &[image("sm_90a")]), Status::Arch);
    assert_eq!(status("capture", &[image("sm_90a")]), Status::Capture);
}

#[test]
fn what_was_loaded_before_a_failure_is_unloaded() {
    let fake = Fake::in_mode("");
    let broken = Image { unit: "broken.cu", fatbin: b"", ..image("sm_90a") };
    Kernels::load(&device(&fake), &[image("sm_90a"), broken]).unwrap_err();
    assert_eq!((fake.calls(c"cuModuleLoadData"), fake.calls(c"cuModuleUnload")), (1, 1));
    assert_eq!(fake.number(c"fake_context_depth"), 0);
}
