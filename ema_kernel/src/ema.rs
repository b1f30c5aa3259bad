//! The two loops over flat buffers, their precisions and their threads. Nothing here knows Python.

use std::iter;
use std::mem;
use std::ops::{Add, Mul, Sub};
use std::process;
use std::sync::{Mutex, OnceLock, PoisonError};

use half::f16;
use multiversion::multiversion;

/// Elements that one thread takes at a time: a block of all three buffers stays in the second-level cache.
const BLOCK: usize = 1 << 15;

/// A further thread pays for each so many elements: waking it costs about as much as half of them.
const SHARE: usize = 1 << 19;

/// Precision in which an average is kept and computed.
pub trait Real:
    Copy + Send + Sync + PartialOrd + From<f32> + Add<Output = Self> + Sub<Output = Self> + Mul<Output = Self>
{
    /// The nearest value of this precision.
    fn nearest(x: f64) -> Self;
}

impl Real for f32 {
    #[expect(clippy::cast_possible_truncation, reason = "the cast rounds to nearest, as wanted")]
    fn nearest(x: f64) -> Self {
        x as Self
    }
}

impl Real for f64 {
    fn nearest(x: f64) -> Self {
        x
    }
}

/// One element of the policy, and how it passes to the average's precision and back.
///
/// Both ways are free of branches and tables, so that the compiler turns them into vector instructions.
pub trait Element: Copy + Send + Sync {
    /// Precision of this policy's average.
    type Average: Real;

    /// The same value in the average's precision.
    fn widen(self) -> Self::Average;

    /// The nearest element, ties to even; infinities stay, NaN stays NaN.
    fn narrow(average: Self::Average) -> Self;
}

impl Element for f32 {
    type Average = Self;

    #[inline]
    fn widen(self) -> Self {
        self
    }

    #[inline]
    fn narrow(average: Self) -> Self {
        average
    }
}

impl Element for f64 {
    type Average = Self;

    #[inline]
    fn widen(self) -> Self {
        self
    }

    #[inline]
    fn narrow(average: Self) -> Self {
        average
    }
}

/// The bits of a bfloat16, which are the upper half of a float32's.
impl Element for u16 {
    type Average = f32;

    #[inline]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self) << 16)
    }

    #[inline]
    #[expect(clippy::cast_possible_truncation, reason = "the upper half has been shifted out")]
    fn narrow(average: f32) -> Self {
        let bits = average.to_bits();
        let to_even = 0x7fff + (bits >> 16 & 1);
        let rounded = bits.wrapping_add(to_even) >> 16;
        let quiet_nan = bits >> 16 | 0x40;
        (if average.is_nan() { quiet_nan } else { rounded }) as Self
    }
}

/// Exponent biases of float16 and float32 differ by 112; ten against 23 bits of mantissa leave 13.
impl Element for f16 {
    type Average = f32;

    #[inline]
    fn widen(self) -> f32 {
        let bits = u32::from(self.to_bits());
        let sign = (bits & 0x8000) << 16;
        let size = (bits & 0x7fff) << 13;
        // A subnormal's mantissa becomes the tail of 2^-14 + x, and the subtraction normalises it.
        let subnormal = f32::from_bits(size + (113 << 23)) - f32::from_bits(113 << 23);
        let magnitude = if size < 1 << 23 {
            subnormal.to_bits()
        } else if size < 31 << 23 {
            size + (112 << 23)
        } else {
            size + (224 << 23)
        };
        f32::from_bits(sign | magnitude)
    }

    #[inline]
    #[expect(clippy::cast_possible_truncation, reason = "every case below fits 16 bits")]
    fn narrow(average: f32) -> Self {
        let sign = average.to_bits() >> 16 & 0x8000;
        let size = average.to_bits() & 0x7fff_ffff;
        // Adding 1/2 leaves a last place of 2^-24, float16's smallest step: the sum rounds as we must.
        let subnormal = (f32::from_bits(size) + 0.5).to_bits().wrapping_sub(0.5_f32.to_bits());
        let to_even = 0x0fff + (size >> 13 & 1);
        let normal = size.wrapping_sub(112 << 23).wrapping_add(to_even) >> 13;
        let quiet_nan = size >> 13 & 0x03ff | 0x7e00;
        let magnitude = if size < 113 << 23 {
            subnormal
        } else if size < 143 << 23 {
            normal
        } else if size <= 255 << 23 {
            0x7c00
        } else {
            quiet_nan
        };
        Self::from_bits((sign | magnitude) as u16)
    }
}

/// `ema <- ema + (1 - decay) * (policy - ema)`, in place. The average of all policies lies in one slice.
///
/// # Panics
///
/// If the policies together are not as long as the average.
pub fn update<P: Element>(ema: &mut [P::Average], policies: &[&[P]], decay: f64, threads: usize) {
    let length = ema.len();
    assert_eq!(length, policies.iter().map(|policy| policy.len()).sum::<usize>(), "lengths differ");
    let weight = P::Average::nearest(1.0 - decay);
    let averages = cut_mut(ema, policies.iter().map(|policy| policy.len()));
    let blocks = iter::zip(averages, policies)
        .flat_map(|(ema, policy)| ema.chunks_mut(BLOCK).zip(policy.chunks(BLOCK)));
    share(
        blocks,
        |(ema, _)| ema.len(),
        helpers(length, threads),
        |(ema, policy)| update_block(ema, policy, weight),
    );
}

/// `policy <- ema`, rounded, then `ema <- init`, in place. The start is known exactly in the policy's precision.
///
/// # Panics
///
/// If the policies together are not as long as the average or its start.
pub fn reset<P: Element>(policies: &mut [&mut [P]], ema: &mut [P::Average], init: &[P], threads: usize) {
    let length = ema.len();
    assert_eq!(length, policies.iter().map(|policy| policy.len()).sum::<usize>(), "lengths differ");
    assert_eq!(length, init.len(), "lengths differ");
    let lengths: Vec<usize> = policies.iter().map(|policy| policy.len()).collect();
    let averages = cut_mut(ema, lengths.iter().copied()).zip(cut(init, lengths.iter().copied()));
    let blocks = iter::zip(policies, averages).flat_map(|(policy, (ema, init))| {
        policy.chunks_mut(BLOCK).zip(ema.chunks_mut(BLOCK)).zip(init.chunks(BLOCK))
    });
    share(
        blocks,
        |((_, ema), _)| ema.len(),
        helpers(length, threads),
        |((policy, ema), init)| reset_block(policy, ema, init),
    );
}

/// Parts of a slice, one after the other, of these lengths.
fn cut<T>(whole: &[T], lengths: impl Iterator<Item = usize>) -> impl Iterator<Item = &[T]> {
    let mut rest = whole;
    lengths.map(move |length| {
        let (front, back) = rest.split_at(length);
        rest = back;
        front
    })
}

fn cut_mut<T>(whole: &mut [T], lengths: impl Iterator<Item = usize>) -> impl Iterator<Item = &mut [T]> {
    let mut rest = whole;
    lengths.map(move |length| {
        let (front, back) = mem::take(&mut rest).split_at_mut(length);
        rest = back;
        front
    })
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
fn update_block<P: Element>(ema: &mut [P::Average], policy: &[P], weight: P::Average) {
    lerp(ema, policy, weight);
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
fn reset_block<P: Element>(policy: &mut [P], ema: &mut [P::Average], init: &[P]) {
    restart(policy, ema, init);
}

/// The two forms of `torch.lerp`, each exact at its own end. Product and sum round one after the other,
/// never fused, so that every vector width gives the same bits.
#[inline(always)]
#[expect(clippy::inline_always, reason = "must be compiled with its caller's vector width")]
fn lerp<P: Element>(ema: &mut [P::Average], policy: &[P], weight: P::Average) {
    if weight < 0.5.into() {
        for (ema, policy) in iter::zip(ema, policy) {
            *ema = *ema + weight * (policy.widen() - *ema);
        }
    } else {
        let rest = P::Average::from(1.0) - weight;
        for (ema, policy) in iter::zip(ema, policy) {
            let end = policy.widen();
            *ema = end - (end - *ema) * rest;
        }
    }
}

#[inline(always)]
#[expect(clippy::inline_always, reason = "must be compiled with its caller's vector width")]
fn restart<P: Element>(policy: &mut [P], ema: &mut [P::Average], init: &[P]) {
    for (policy, ema) in iter::zip(policy, &*ema) {
        *policy = P::narrow(*ema);
    }
    for (ema, init) in iter::zip(ema, init) {
        *ema = init.widen();
    }
}

/// How many threads shall help the calling one.
fn helpers(length: usize, threads: usize) -> usize {
    static POOL_OWNER: OnceLock<Option<u32>> = OnceLock::new();
    let useful = threads.min(length.div_ceil(SHARE)).saturating_sub(1);
    // A forked process inherits the pool without its threads and would wait for them for ever.
    if useful == 0 || *POOL_OWNER.get_or_init(start_pool) != Some(process::id()) {
        return 0;
    }
    useful.min(rayon::current_num_threads() - 1)
}

/// Starts the helpers and gives their process. The calling thread joins the pool, so it can take back what no
/// helper has begun: one that finds no free core, because torch's own threads spin there, costs no time.
fn start_pool() -> Option<u32> {
    let pool = rayon::ThreadPoolBuilder::new().use_current_thread().build_global();
    pool.is_ok().then(process::id)
}

/// Calls `work` on every block, from the calling thread and `helpers` more. Each takes the next blocks when it
/// is free, so many that small parameters do not cost a lock each.
fn share<I>(
    blocks: I,
    length: impl Fn(&I::Item) -> usize + Sync,
    helpers: usize,
    work: impl Fn(I::Item) + Sync,
) where
    I: Iterator + Send,
    I::Item: Send,
{
    if helpers == 0 {
        return blocks.for_each(work);
    }
    let queue = Mutex::new(blocks);
    let take = || {
        let mut queue = queue.lock().unwrap_or_else(PoisonError::into_inner);
        let mut taken = Vec::new();
        let mut elements = 0;
        while elements < BLOCK {
            let Some(block) = queue.next() else { break };
            elements += length(&block);
            taken.push(block);
        }
        (!taken.is_empty()).then_some(taken)
    };
    let drain = || iter::from_fn(take).flatten().for_each(&work);
    rayon::in_place_scope(|scope| {
        for _ in 0..helpers {
            scope.spawn(|_| drain());
        }
        drain();
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;

    const LENGTHS: [usize; 8] = [0, 1, 7, 64, 1001, BLOCK, BLOCK + 1, 3 * BLOCK + 5];

    /// Pseudo-random bits (the splitmix64 sequence).
    fn noise(seed: u64) -> impl Iterator<Item = u64> {
        (1..).map(move |i: u64| {
            let mut z = (seed + i).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ z >> 31
        })
    }

    /// Numbers of every size, with zeros, subnormals and infinities, but no NaN: its bits may vary.
    fn floats(seed: u64, length: usize) -> Vec<f32> {
        let bits = noise(seed).map(|z| f32::from_bits(u32::try_from(z >> 32).unwrap()));
        bits.filter(|x| !x.is_nan()).take(length).collect()
    }

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|x| if x.is_nan() { f32::NAN.to_bits() } else { x.to_bits() }).collect()
    }

    #[test]
    fn update_is_the_formula() {
        for length in LENGTHS {
            let mut ema = vec![0.0_f32; length];
            update(&mut ema, &[&vec![1.0_f32; length]], 0.75, 1);
            assert_eq!(ema, vec![0.25; length]);
            update(&mut ema, &[&vec![1.0_f32; length]], 0.25, 1);
            assert_eq!(ema, vec![0.8125; length]);
        }
    }

    #[test]
    fn update_is_exact_at_both_ends() {
        let (start, end) = (floats(1, 999), floats(2, 999));
        let finite = |x: f32| if x.abs() < 1e30 { x } else { 1.0 };
        let (start, end): (Vec<f32>, Vec<f32>) =
            (start.into_iter().map(finite).collect(), end.into_iter().map(finite).collect());
        for (decay, expected) in [(1.0, &start), (0.0, &end)] {
            let mut ema = start.clone();
            update(&mut ema, &[&end], decay, 1);
            assert_eq!(&ema, expected);
        }
    }

    #[test]
    fn update_in_double_precision() {
        let mut ema = [1.0_f64, -3.0];
        update(&mut ema, &[&[2.0, 5.0]], 0.9, 1);
        let weight = 1.0 - 0.9;
        let expected = [1.0 + weight * (2.0 - 1.0), -3.0 + weight * (5.0 - -3.0)];
        assert_eq!(ema.map(f64::to_bits), expected.map(f64::to_bits));
    }

    #[test]
    fn update_widens_the_policy() {
        let values = [0.5, -1.25, 65504.0, 6e-8];
        let halves = values.map(f16::from_f32);
        let (mut ema, mut expected) = ([1.0_f32; 4], [1.0_f32; 4]);
        update(&mut ema, &[&halves], 0.9, 1);
        update(&mut expected, &[&halves.map(f16::to_f32)], 0.9, 1);
        assert_eq!(bits(&ema), bits(&expected));

        let halves = values.map(bf16::from_f32);
        let (mut ema, mut expected) = ([1.0_f32; 4], [1.0_f32; 4]);
        update(&mut ema, &[&halves.map(bf16::to_bits)], 0.9, 1);
        update(&mut expected, &[&halves.map(bf16::to_f32)], 0.9, 1);
        assert_eq!(bits(&ema), bits(&expected));
    }

    #[test]
    fn reset_restarts_from_the_average() {
        for length in LENGTHS {
            let (average, init) = (floats(3, length), floats(4, length));
            let (mut policy, mut ema) = (vec![9.0_f32; length], average.clone());
            reset(&mut [&mut policy], &mut ema, &init, 1);
            assert_eq!((policy, &ema), (average.clone(), &init));

            let start: Vec<bf16> = init.iter().map(|&x| bf16::from_f32(x)).collect();
            let (mut policy, mut ema) = (vec![9_u16; length], average.clone());
            reset(&mut [&mut policy], &mut ema, &start.iter().map(|x| x.to_bits()).collect::<Vec<_>>(), 1);
            let rounded: Vec<u16> = average.iter().map(|&x| bf16::from_f32(x).to_bits()).collect();
            assert_eq!((policy, ema), (rounded, start.iter().map(|x| x.to_f32()).collect()));

            let start: Vec<f16> = init.iter().map(|&x| f16::from_f32(x)).collect();
            let (mut policy, mut ema) = (vec![f16::ONE; length], average.clone());
            reset(&mut [&mut policy], &mut ema, &start, 1);
            let rounded: Vec<f16> = average.iter().map(|&x| f16::from_f32(x)).collect();
            assert_eq!((policy, ema), (rounded, start.iter().map(|x| x.to_f32()).collect()));
        }
    }

    #[test]
    fn every_half_widens_exactly() {
        for bits in 0..=u16::MAX {
            let (ours, theirs) = (f16::from_bits(bits).widen(), f16::from_bits(bits).to_f32());
            assert!(ours.to_bits() == theirs.to_bits() || ours.is_nan() && theirs.is_nan(), "f16 {bits:#x}");
            let (ours, theirs) = (bits.widen(), bf16::from_bits(bits).to_f32());
            assert!(ours.to_bits() == theirs.to_bits() || ours.is_nan() && theirs.is_nan(), "bf16 {bits:#x}");
        }
    }

    fn check_narrow(x: f32) {
        let (ours, theirs) = (f16::narrow(x), f16::from_f32(x));
        assert!(ours.to_bits() == theirs.to_bits() || ours.is_nan() && x.is_nan(), "f16 of {x:e}");
        let (ours, theirs) = (bf16::from_bits(u16::narrow(x)), bf16::from_f32(x));
        assert!(ours.to_bits() == theirs.to_bits() || ours.is_nan() && x.is_nan(), "bf16 of {x:e}");
    }

    /// Every value of both half precisions, every midpoint between neighbours, and the float32 beside each.
    #[test]
    fn ties_go_to_even() {
        for bits in 0..u16::MAX {
            let f16s = (f16::from_bits(bits).to_f32(), f16::from_bits(bits + 1).to_f32());
            let bf16s = (bf16::from_bits(bits).to_f32(), bf16::from_bits(bits + 1).to_f32());
            for (low, high) in [f16s, bf16s] {
                let middle = f32::midpoint(low, high);
                for x in [low, middle, middle.next_down(), middle.next_up()] {
                    check_narrow(x);
                }
            }
        }
    }

    #[test]
    fn narrow_rounds_a_sample_of_all_floats() {
        (0..=u32::MAX).step_by(4093).map(f32::from_bits).for_each(check_narrow);
    }

    /// Run with `cargo test -- --ignored`.
    #[test]
    #[ignore = "2^32 cases take some ten seconds"]
    fn narrow_rounds_every_float() {
        (0..=u32::MAX).map(f32::from_bits).for_each(check_narrow);
    }

    #[multiversion(targets("x86_64+avx2"))]
    fn lerp_avx2<P: Element>(ema: &mut [P::Average], policy: &[P], weight: P::Average) {
        lerp(ema, policy, weight);
    }

    #[multiversion(targets("x86_64+avx2"))]
    fn restart_avx2<P: Element>(policy: &mut [P], ema: &mut [P::Average], init: &[P]) {
        restart(policy, ema, init);
    }

    #[test]
    fn every_vector_width_gives_the_same_bits() {
        type Lerp = fn(&mut [f32], &[f32], f32);
        type Restart = fn(&mut [f16], &mut [f32], &[f16]);
        let lerps: [Lerp; 3] = [lerp::<f32>, lerp_avx2::<f32>, update_block::<f32>];
        let restarts: [Restart; 3] = [restart::<f16>, restart_avx2::<f16>, reset_block::<f16>];
        for length in (0..130).chain([1000, 12345]) {
            let (ema, policy) = (floats(5, length), floats(6, length));
            for weight in [0.005, 0.3, 0.5, 0.995] {
                let [narrow, avx2, widest] = lerps.map(|lerp| {
                    let mut ema = ema.clone();
                    lerp(&mut ema, &policy, weight);
                    bits(&ema)
                });
                assert_eq!((&narrow, &narrow), (&avx2, &widest));
            }
            let start: Vec<f16> = policy.iter().map(|&x| f16::from_f32(x)).collect();
            let [narrow, avx2, widest] = restarts.map(|restart| {
                let (mut halves, mut ema) = (vec![f16::ONE; length], ema.clone());
                restart(&mut halves, &mut ema, &start);
                (halves.into_iter().map(f16::to_bits).collect::<Vec<_>>(), bits(&ema))
            });
            assert_eq!((&narrow, &narrow), (&avx2, &widest));
        }
    }

    #[test]
    fn every_cut_and_number_of_threads_gives_the_same_bits() {
        for length in [SHARE, SHARE + 1, 3 * SHARE + 7] {
            let (start, policy) = (floats(7, length), floats(8, length));
            let rounded: Vec<u16> = start.iter().map(|&x| bf16::from_f32(x).to_bits()).collect();
            let widened: Vec<f32> = rounded.iter().map(|x| x.widen()).collect();
            let run = |part, threads| {
                let (mut ema, mut halves) = (start.clone(), vec![0_u16; length]);
                update(&mut ema, &policy.chunks(part).collect::<Vec<_>>(), 0.995, threads);
                let averaged = bits(&ema);
                reset(&mut halves.chunks_mut(part).collect::<Vec<_>>(), &mut ema, &rounded, threads);
                assert_eq!(ema, widened);
                (averaged, halves)
            };
            let whole = run(length, 1);
            for (part, threads) in [(length, 2), (BLOCK + 1, 1), (BLOCK + 1, 3), (17, 1), (17, 2), (1000, 64)]
            {
                assert!(whole == run(part, threads), "{length} elements by {part} on {threads} threads");
            }
        }
    }

    #[test]
    fn small_buffers_stay_on_one_thread() {
        assert_eq!([0, 1, SHARE].map(|length| helpers(length, 64)), [0; 3]);
        assert_eq!(helpers(SHARE + 1, 1), 0);
        let on_this_machine = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        assert_eq!(helpers(SHARE + 1, 64), 1.min(on_this_machine - 1));
    }

    #[test]
    #[should_panic(expected = "lengths differ")]
    fn update_refuses_different_lengths() {
        update(&mut [0.0_f32; 2], &[&[0.0_f32; 3]], 0.5, 1);
    }
}
