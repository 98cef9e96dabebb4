//! Fault 14 (docs/reliability.md): the host program's log sink, a `tracing` subscriber, panics inside our calls. That is
//! E_PANIC at the border and never the end of the process, and the next plan computes what it did before.

#![allow(clippy::panic, reason = "a test of panics")]

mod capi_world;

use std::cell::Cell;
use std::sync::Once;

use capi_world::{World, last_error};
use compactattn::capi::{compactattn_status as status, *};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

#[test]
fn a_sink_that_panics_ends_in_a_status() {
    listen();
    for place in [Place::NewSpan, Place::Enter, Place::Exit, Place::Close] {
        for rest in [Rest::Works, Rest::Panics] {
            for seed in 0..20 {
                in_a_step(place, rest, seed);
            }
        }
    }
}

#[test]
fn a_sink_that_panics_while_a_plan_is_made_leaves_no_plan() {
    listen();
    let world = World::random(1);
    let mut plan = std::ptr::null_mut();
    arm(Place::Event, Rest::Panics);
    // SAFETY: the context and the description are the world's, alive; `plan` is writable.
    let made = unsafe { compactattn_plan_create(world.context, &raw const world.desc, &raw mut plan) };
    assert!(disarm(), "no event came");
    assert_eq!(made, status::COMPACTATTN_E_PANIC);
    assert!(plan.is_null());
    assert_eq!(world.forward(), status::COMPACTATTN_OK, "{}", last_error());
    world.close();
}

fn in_a_step(place: Place, rest: Rest, seed: u64) {
    let clean = World::random(seed);
    assert_eq!(clean.forward(), status::COMPACTATTN_OK, "{}", last_error());
    let world = World::random(seed);
    arm(place, rest);
    let ended = world.forward();
    let what = format!("{place:?} {rest:?} {seed}");
    assert!(disarm(), "{what}: the sink heard nothing");
    assert_eq!(ended, status::COMPACTATTN_E_PANIC, "{what}");
    let text = last_error();
    assert!(text.starts_with("E_PANIC: ") && !text.contains("on purpose"), "{what}: {text}");
    assert!(world.canaries_hold(), "{what}");
    // What it left half done is nobody's result: that plan refuses, and another one, on the same memory, works.
    assert_eq!(world.forward(), status::COMPACTATTN_E_PANIC, "{what}");
    world.close();
    let next = World::random(seed);
    assert_eq!(next.forward(), status::COMPACTATTN_OK, "{what}: {}", last_error());
    assert!(next.results() == clean.results(), "{what}");
    next.close();
    clean.close();
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    NewSpan,
    Enter,
    Exit,
    Close,
    Event,
}

/// What the sink does after its first panic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rest {
    Works,
    Panics,
}

#[derive(Clone, Copy)]
enum State {
    Quiet,
    Armed(Place, Rest),
    Panicked(Rest),
}

thread_local! {
    static STATE: Cell<State> = const { Cell::new(State::Quiet) };
}

fn arm(place: Place, rest: Rest) {
    STATE.set(State::Armed(place, rest));
}

/// Whether it has panicked.
fn disarm() -> bool {
    matches!(STATE.replace(State::Quiet), State::Panicked(_))
}

/// The sink of this process, whichever test is first.
fn listen() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| assert!(tracing::subscriber::set_global_default(Sink).is_ok()));
}

struct Sink;

fn hears(now: Place) {
    match STATE.get() {
        State::Armed(place, rest) if place == now => {
            STATE.set(State::Panicked(rest));
            panic!("on purpose: {now:?}");
        }
        State::Panicked(Rest::Panics) => panic!("on purpose, again: {now:?}"),
        _ => {}
    }
}

impl Subscriber for Sink {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        hears(Place::NewSpan);
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, _: &Event<'_>) {
        hears(Place::Event);
    }

    fn enter(&self, _: &Id) {
        hears(Place::Enter);
    }

    fn exit(&self, _: &Id) {
        hears(Place::Exit);
    }

    fn try_close(&self, _: Id) -> bool {
        hears(Place::Close);
        true
    }
}
