//! Two results over disjoint KV merged: against f64, bit for bit where one side is empty, NaN where one is, eager and
//! replayed.

use compactattn::capi::*;
use compactattn::settings::Selector;
use compactattn::types::Dtype;

use super::abi::{F32, Plan, Refusal, tensor};
use super::device::{Device, struct_size};
use super::driver::Handle;
use super::memory::{Memory, POISON, Packing, Part};
use super::scenes;
use super::step::{Done, Given, ok, store_bytes, store_of};
use crate::common::case::{Case, Lens};
use crate::common::pool::{Packed, Store};
use crate::common::rng::Rng;

/// `count` random merges; whether all are right.
pub(crate) fn run(device: &Device, count: usize, packing: Packing) -> bool {
    device.enter();
    let (mut memory, stream) = (Memory::new(device, packing), device.new_stream());
    let mut wrong = 0;
    for seed in 0..count as u64 {
        match one(device, &mut memory, stream, seed) {
            Ok(()) => {}
            Err(Refusal::Unsupported(why)) => println!("  not offered here: {why}"),
            Err(Refusal::Fault(why)) => {
                println!("  merge {seed}: {why}");
                wrong += 1;
            }
        }
    }
    if let Some(cuda) = &device.cuda {
        cuda.destroy_stream(stream);
    }
    wrong == 0
}

fn one(device: &Device, memory: &mut Memory, stream: Handle, seed: u64) -> Result<(), Refusal> {
    let mut rng = Rng::new(seed);
    let sides = Sides::random(&mut rng);
    let plan = Plan::new(device, &sides.case, &Given::Nothing)?;
    let parts = sides.place(memory);
    memory.push();
    // Canaries are kept after a workspace, of which this call wants none.
    memory.workspace(0);
    let args = sides.args(memory, &parts, stream);
    // SAFETY: the struct describes parts of the memory.
    let merge = || ok("combine", unsafe { compactattn_combine(plan.handle, &raw const args) });
    let verdict = (|| {
        merge()?;
        memory.pull();
        if !memory.canaries_hold(0) {
            return Err("something beside a buffer was written to".into());
        }
        sides.judge(memory, &parts)?;
        replayed(device, memory, stream, ([parts[4], parts[5]], &merge))
    })();
    verdict.map_err(Refusal::Fault)
}

/// The same call from a graph has the same bits.
fn replayed(
    device: &Device,
    memory: &Memory,
    stream: Handle,
    (results, merge): ([Part; 2], &dyn Fn() -> Done),
) -> Done {
    let Some(cuda) = &device.cuda else { return Ok(()) };
    let eager = results.map(|part| memory.get(part));
    let (graph, done) = cuda.capture(stream, merge);
    done.map_err(|e| format!("under capture: {e}"))?;
    results.iter().for_each(|&part| memory.poison(part));
    graph?.launch(stream);
    cuda.sync_stream(stream);
    if results.map(|part| memory.get(part)) == eager { Ok(()) } else { Err("a replay has other bits".into()) }
}

/// Rows of both sides; a row without weight is NaN where it may not be read.
struct Sides {
    case: Case,
    total_q: usize,
    out: [Packed; 2],
    lse: [Vec<f32>; 2],
    lse_stride: usize,
}

/// Every so many rows, a side saw nothing.
const EMPTY: usize = 5;

/// Every so many of the others, it went wrong.
const WRONG: usize = 40;

impl Sides {
    fn random(rng: &mut Rng) -> Self {
        let heads = rng.pick(&[[1, 1], [4, 2], [7, 1], [32, 8]]);
        let dtype = rng.pick(&[Dtype::Bf16, Dtype::F16]);
        let shape = scenes::shape(heads, rng.pick(&[64, 96, 128, 256]), 16, dtype);
        let total_q = rng.pick(&[1, 2, 33, 300]);
        let settings = scenes::settings(Selector::Dense, 16);
        let case = Case::with(rng, shape, settings, &[Lens { q: total_q, kv: total_q }]);
        let lse_stride = total_q + rng.below(4);
        let spread = rng.pick(&[0.1, 3.0, 60.0]);
        let mut lse =
            [0, 1].map(|_| (0..heads[0] * lse_stride).map(|_| spread * rng.normal()).collect::<Vec<_>>());
        let mut out = [0, 1].map(|_| Packed::poisoned(rng, &shape, total_q));
        for (token, head) in (0..total_q).flat_map(|t| (0..heads[0]).map(move |h| (t, h))) {
            for side in 0..2 {
                let lse = &mut lse[side][head * lse_stride + token];
                let (empty, wrong) = (rng.once_in(EMPTY), rng.once_in(WRONG));
                if empty {
                    *lse = f32::NEG_INFINITY;
                    continue;
                }
                *lse = if wrong { f32::NAN } else { *lse };
                let row: Vec<f32> = (0..shape.head_dim).map(|_| rng.normal()).collect();
                out[side].write(token, head, &row);
            }
        }
        Self { case, total_q, out, lse, lse_stride }
    }

    /// out_a, lse_a, out_b, lse_b, out, lse.
    fn place(&self, memory: &mut Memory) -> [Part; 6] {
        memory.clear();
        let [a, b] = [0, 1].map(|side| {
            let out = memory.add(store_bytes(&self.out[side].store));
            (out, memory.add(bytemuck::cast_slice(&self.lse[side])))
        });
        // As the first side lies.
        let [out, lse] = [a.0, a.1].map(|like| memory.add_poison(like.len));
        [a.0, a.1, b.0, b.1, out, lse]
    }

    fn args(&self, memory: &Memory, parts: &[Part; 6], stream: Handle) -> compactattn_combine_args {
        let shape = &self.case.shape;
        let rows = |part: Part, like: &Packed| {
            let dims = [self.total_q, shape.num_q_heads, shape.head_dim];
            let strides = [like.stride_token, like.stride_head, 1];
            tensor(memory.address(part), part.len, shape.dtype as i32, &dims, Some(&strides))
        };
        let lse = |part: Part| {
            let dims = [shape.num_q_heads, self.total_q];
            tensor(memory.address(part), part.len, F32, &dims, Some(&[self.lse_stride, 1]))
        };
        compactattn_combine_args {
            struct_size: struct_size::<compactattn_combine_args>(),
            reserved: 0,
            out_a: rows(parts[0], &self.out[0]),
            lse_a: lse(parts[1]),
            out_b: rows(parts[2], &self.out[1]),
            lse_b: lse(parts[3]),
            out: rows(parts[4], &self.out[0]),
            lse: lse(parts[5]),
            stream,
        }
    }

    fn judge(&self, memory: &Memory, parts: &[Part; 6]) -> Done {
        let inputs = [parts[0], parts[1], parts[2], parts[3]].map(|part| memory.bytes(part));
        let [a, b] = [0, 1].map(|side| store_bytes(&self.out[side].store));
        let [lse_a, lse_b] = [0, 1].map(|side| bytemuck::cast_slice(&self.lse[side]));
        if inputs != [a, lse_a, b, lse_b] {
            return Err("an input was written to".into());
        }
        let like = &self.out[0];
        let got = Packed {
            store: store_of(self.case.shape.dtype, memory.bytes(parts[4])),
            stride_token: like.stride_token,
            stride_head: like.stride_head,
        };
        let lse: Vec<f32> = bytemuck::pod_collect_to_vec(memory.bytes(parts[5]));
        let heads = self.case.shape.num_q_heads;
        for (token, head) in (0..self.total_q).flat_map(|t| (0..heads).map(move |h| (t, h))) {
            let at = head * self.lse_stride + token;
            let row = got.read(token, head, self.case.shape.head_dim);
            self.row(token, head, (&row, lse[at])).map_err(|e| format!("token {token}, head {head}: {e}"))?;
        }
        self.gaps(&got.store, &lse)
    }

    fn row(&self, token: usize, head: usize, (got, got_lse): (&[f32], f32)) -> Done {
        let lse = [0, 1].map(|side| self.lse[side][head * self.lse_stride + token]);
        let rows = [0, 1].map(|side| self.out[side].read(token, head, got.len()));
        if lse.iter().any(|x| x.is_nan()) {
            let all_nan = got_lse.is_nan() && got.iter().all(|x| x.is_nan());
            return if all_nan { Ok(()) } else { Err("a side that went wrong is not seen".into()) };
        }
        let seen = lse.map(|x| x > f32::NEG_INFINITY);
        let bits = |xs: &[f32]| xs.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        if seen != [true, true] {
            let nothing = (vec![0.0; got.len()], f32::NEG_INFINITY);
            let want = match seen {
                [false, false] => nothing,
                [first, _] => (rows[usize::from(!first)].clone(), lse[usize::from(!first)]),
            };
            let same = bits(got) == bits(&want.0) && got_lse.to_bits() == want.1.to_bits();
            return if same { Ok(()) } else { Err("not the bits of the side that saw something".into()) };
        }
        let lse = lse.map(f64::from);
        let most = lse[0].max(lse[1]);
        let weights = lse.map(|x| (x - most).exp());
        let sum = weights[0] + weights[1];
        // In f32: the difference of two lse is exact or one rounding, exp and ln are within 2 units, and the division,
        // two products and a sum round once each: (difference + 8) units of the weighted magnitudes, and what f32 has
        // no number for below 2^-149.
        let unit = f64::from(f32::EPSILON);
        let apart = (lse[0] - lse[1]).abs() + 8.0;
        off(f64::from(got_lse), most + sum.ln(), (most.abs() + apart) * unit)
            .map_err(|e| format!("lse {e}"))?;
        // Half a step of the dtype: 8 and 11 significant bits; f16 has steps of 2^-24 below 2^-14.
        let half_step = if self.case.shape.dtype == Dtype::Bf16 { 1.0 / 256.0 } else { 1.0 / 2048.0 };
        for (i, &got) in got.iter().enumerate() {
            let parts = [0, 1].map(|side| weights[side] / sum * f64::from(rows[side][i]));
            let (want, size) = (parts[0] + parts[1], parts[0].abs() + parts[1].abs());
            let error = size * apart * unit + want.abs() * half_step + 1.0 / f64::from(1 << 25);
            off(f64::from(got), want, error).map_err(|e| format!("out[{i}] {e}"))?;
        }
        Ok(())
    }

    /// Between rows everything is poison still.
    fn gaps(&self, out: &Store, lse: &[f32]) -> Done {
        let (heads, dim) = (self.case.shape.num_q_heads, self.case.shape.head_dim);
        let bits = out.bits();
        let mut free = vec![true; bits.len()];
        let like = &self.out[0];
        for (token, head) in (0..self.total_q).flat_map(|t| (0..heads).map(move |h| (t, h))) {
            free[token * like.stride_token + head * like.stride_head..][..dim].fill(false);
        }
        let poison = u32::from(u16::from_ne_bytes([POISON; 2]));
        let touched = bits.iter().zip(free).any(|(&bits, free)| free && bits != poison);
        let poison = u32::from_ne_bytes([POISON; 4]);
        let between = |at: &usize| at % self.lse_stride >= self.total_q;
        let lse_touched = (0..lse.len()).filter(between).any(|at| lse[at].to_bits() != poison);
        if touched || lse_touched { Err("a gap between rows was written to".into()) } else { Ok(()) }
    }
}

fn off(got: f64, want: f64, error: f64) -> Done {
    if (got - want).abs() <= error { Ok(()) } else { Err(format!("{got}, not {want} (+-{error:.1e})")) }
}
