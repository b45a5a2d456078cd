//! Where the values of operators go.

use crate::report::entry::ClusterName;

/// Where values go: each kind of line writes them in its own way.
pub trait Values {
    /// There is no value.
    fn nothing(&mut self);
    fn number(&mut self, n: u64);
    /// A text that may have anything in it.
    fn text(&mut self, text: &[u8]);
    /// A text that is put together behind the line, of which nothing has to be escaped.
    fn plain(&mut self, push: impl FnOnce(&mut Vec<u8>));
    fn cluster(&mut self, cluster: &ClusterName<'_>);
}

/// Takes only the first bytes of texts, as Envoy does.
pub(super) struct Cut<'v, V> {
    pub(super) values: &'v mut V,
    pub(super) most: usize,
}

impl<V: Values> Values for Cut<'_, V> {
    fn nothing(&mut self) {
        self.values.nothing();
    }

    fn number(&mut self, n: u64) {
        self.values.number(n);
    }

    fn text(&mut self, text: &[u8]) {
        self.values.text(text.get(..self.most).unwrap_or(text));
    }

    fn plain(&mut self, push: impl FnOnce(&mut Vec<u8>)) {
        let mut text = Vec::new();
        push(&mut text);
        self.text(&text);
    }

    fn cluster(&mut self, cluster: &ClusterName<'_>) {
        self.text(cluster.to_string().as_bytes());
    }
}
