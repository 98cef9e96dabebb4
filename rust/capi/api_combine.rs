//! Exported: two results over disjoint KV to one.

use super::check::check;
use super::compactattn_status;
use super::device_tables;
use super::guard::guard;
use super::handle;
use super::merge::{Side, merge};
use super::objects::PlanObject;
use super::read::input;
use super::structs::{compactattn_plan, compactattn_tensor};
use super::structs_step::compactattn_combine_args;
use super::tensor::{Dim, View, Wanted, check_apart};
use super::views::{OutputViews, q_like};
use crate::error::Result;
use crate::tensor::Tokens;
use crate::types::Dtype;

/// Merges two results of the same queries over disjoint KV, weighted by their lse; for prefix and suffix, or for ranks
/// that hold parts of the context.
///
/// # Safety
/// As compactattn_attend.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn compactattn_combine(
    plan: *const compactattn_plan,
    args: *const compactattn_combine_args,
) -> compactattn_status {
    guard(|| {
        handle::plan(plan.cast())?.run(|plan| {
            // SAFETY: this function's contract.
            let args = unsafe { input("args", args) }?;
            // SAFETY: this function's contract.
            unsafe { combine_args(plan, &args) }
        })
    })
}

/// # Safety
/// As [`compactattn_combine`], for what `args` points to.
unsafe fn combine_args(plan: &PlanObject, args: &compactattn_combine_args) -> Result<()> {
    plan.check_stream(args.stream)?;
    let shape = plan.layout(0)?.shape;
    let device = plan.context.device;
    let out_a = check(&args.out_a, &q_like("args.out_a", &shape, Dim::Any, device))?;
    let total_q = out_a.shape[0];
    let tokens = Dim::Is(total_q, "total_q");
    let out_b = check(&args.out_b, &q_like("args.out_b", &shape, tokens, device))?;
    let heads = Dim::Is(shape.num_q_heads, "num_q_heads");
    let lse = |name, lse: &compactattn_tensor| {
        check(lse, &Wanted::rows(name, Dtype::F32, vec![heads, tokens], device))
    };
    let (lse_a, lse_b) = (lse("args.lse_a", &args.lse_a)?, lse("args.lse_b", &args.lse_b)?);
    let results = OutputViews::check(plan, &shape, total_q, (&args.out, &args.lse))?;
    check_apart(&results.views(), &[out_a, lse_a, out_b, lse_b])?;
    if let Some(cuda) = &plan.cuda {
        return device_tables::combine(
            cuda,
            (&shape, args.stream),
            [(out_a, lse_a), (out_b, lse_b)],
            &results,
        );
    }
    // SAFETY: this function's contract; outputs lie apart from inputs.
    let a = unsafe { side(&out_a, &lse_a) };
    // SAFETY: as above.
    let b = unsafe { side(&out_b, &lse_b) };
    // SAFETY: as above, and apart from each other.
    let (mut out, mut lse) = unsafe { results.open() };
    merge(&shape, total_q, (&a, &b), &mut out, lse.as_mut());
    Ok(())
}

/// # Safety
/// As [`View::slice`].
unsafe fn side<'a>(out: &View, lse: &View) -> Side<'a> {
    // SAFETY: this function's contract; the dtype is a floating-point one.
    let elements = unsafe { out.elements() };
    let out = Tokens { elements, stride_token: out.stride[0], stride_head: out.stride[1] };
    // SAFETY: this function's contract; the dtype is f32.
    Side { out, lse: unsafe { lse.slice() }, stride_head: lse.stride[0] }
}
