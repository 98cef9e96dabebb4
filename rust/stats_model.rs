//! Two counters in every order that their users' operations can have. Eight, which are no less alone, would take days.

use loom::sync::Arc;
use loom::thread;

use super::*;

type Pair = [AtomicU64; 2];

#[test]
fn calls_of_two_threads_are_all_counted() {
    loom::model(|| {
        let counters = pair(0);
        let other = meanwhile(&counters, |counters| add(counters, [1, 7]));
        add(&counters, [1, 5]);
        other.join().unwrap();
        assert_eq!(read(&counters), [2, 12]);
    });
}

#[test]
fn a_reader_sees_each_call_added_or_not_and_none_taken_back() {
    loom::model(|| {
        let counters = pair(0);
        let caller = meanwhile(&counters, |counters| {
            add(counters, [1, 7]);
            add(counters, [1, 7]);
        });
        let [first, second] = [(); 2].map(|()| read(&counters));
        caller.join().unwrap();
        for (i, call) in [1, 7].into_iter().enumerate() {
            assert!(first[i] <= second[i] && second[i] <= 2 * call, "{first:?}, then {second:?}");
            assert!(first[i] % call == 0 && second[i] % call == 0, "{first:?}, then {second:?}");
        }
    });
}

/// A GPU overwrites counters in host memory, each by one store of 64 bits, while the host reads.
#[test]
fn a_counter_that_passes_32_bits_is_read_whole() {
    mirror(|counters| read(counters));
}

/// Two loads of 32 bits: between them the other half may change.
#[test]
#[should_panic(expected = "was never counted")]
fn halves_that_are_read_one_by_one_are_found_out() {
    let half = |counter: &AtomicU64, mask: u64| counter.load(Ordering::Relaxed) & mask;
    mirror(move |counters| counters.each_ref().map(|x| half(x, LOW) | half(x, !LOW)));
}

fn mirror(read: impl Fn(&Pair) -> [u64; 2] + Send + Sync + 'static) {
    loom::model(move || {
        let counters = pair(LOW);
        let device = meanwhile(&counters, |counters| {
            for counter in counters {
                counter.store(LOW + 1, Ordering::Relaxed);
            }
        });
        for number in read(&counters) {
            assert!([LOW, LOW + 1].contains(&number), "{number:#x} was never counted");
        }
        device.join().unwrap();
        assert_eq!(read(&counters), [LOW + 1; 2]);
    });
}

fn pair(number: u64) -> Arc<Pair> {
    Arc::new([(); 2].map(|()| AtomicU64::new(number)))
}

fn meanwhile(counters: &Arc<Pair>, body: impl FnOnce(&Pair) + 'static) -> thread::JoinHandle<()> {
    let counters = Arc::clone(counters);
    thread::spawn(move || body(&counters))
}

const LOW: u64 = u32::MAX as u64;
