//! [`Page`]: one answer to `/metrics`, made of what is known at that moment.

use std::sync::atomic::AtomicU64;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// Names and values; one series has each name once.
pub type Labels = Vec<(&'static str, String)>;

/// Names follow Prometheus' conventions: `holdfast_` in front, the unit behind, counters told without `_total`, which is
/// added.
#[derive(Default)]
pub struct Page {
    registry: Registry,
}

impl Page {
    pub fn new() -> Page {
        Page::default()
    }

    /// What goes up and down. `help` is a sentence without the full stop, which is added.
    pub fn gauge(&mut self, name: &str, help: &str, series: impl IntoIterator<Item = (Labels, f64)>) {
        let family = Family::<Labels, Gauge<f64, AtomicU64>>::default();
        for (labels, value) in series {
            family.get_or_create(&labels).set(value);
        }
        self.registry.register(name, help, family);
    }

    /// What only goes up while the process lives.
    pub fn counter(&mut self, name: &str, help: &str, series: impl IntoIterator<Item = (Labels, u64)>) {
        let family = Family::<Labels, Counter>::default();
        for (labels, value) in series {
            family.get_or_create(&labels).inc_by(value);
        }
        self.registry.register(name, help, family);
    }

    /// As `/metrics` answers it.
    pub fn text(&self) -> String {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry).expect("a string takes everything");
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_what_prometheus_reads() {
        let mut page = Page::new();
        let labels = |volume: &str| vec![("volume", volume.to_owned())];
        page.gauge("holdfast_size_bytes", "Size of a volume", [(labels("a"), 4096.0), (labels("b\"\\"), 1.5)]);
        page.counter("holdfast_requests", "Requests taken", [(Vec::new(), 7)]);
        let text = page.text();
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines.contains(&"# HELP holdfast_size_bytes Size of a volume."), "{text}");
        assert!(lines.contains(&"# TYPE holdfast_size_bytes gauge"), "{text}");
        assert!(lines.contains(&"holdfast_size_bytes{volume=\"a\"} 4096.0"), "{text}");
        assert!(lines.contains(&"holdfast_size_bytes{volume=\"b\\\"\\\\\"} 1.5"), "{text}");
        assert!(lines.contains(&"# TYPE holdfast_requests counter"), "{text}");
        assert!(lines.contains(&"holdfast_requests_total{} 7"), "{text}");
        assert_eq!(lines.last(), Some(&"# EOF"));
    }
}
